// SPDX-License-Identifier: Apache-2.0
// What every op's XLA glue shares: how a call is compiled, and how it runs.
//
// Inside tf.function(jit_compile=True) an op becomes a typed custom call of its
// own name: operands and results are the op's, and the workspace is one result
// more, as XLA has no other scratch on the host. An XlaCall tells what is
// particular to an op. It sees no header of XLA, which take long to compile.

#ifndef TF_DEFORM_CC_XLA_GLUE_H_
#define TF_DEFORM_CC_XLA_GLUE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "cc/core/common.h"
#include "cc/tf/attributes.h"

struct XLA_FFI_CallFrame;
struct XLA_FFI_Error;

namespace tensorflow {
class OpKernel;
class OpKernelConstruction;
}  // namespace tensorflow

namespace tf_deform {

// The attributes of a call by name: the node's while XLA compiles it, the
// custom call's, which are the same, when it runs. A `Source` of attributes.h.
class XlaAttributes {
 public:
  using Value = std::variant<int64_t, std::string, std::vector<int64_t>,
                             std::vector<float>>;

  void Set(const std::string& name, Value value) {
    values_[name] = std::move(value);
  }
  const std::map<std::string, Value>& values() const { return values_; }

  // Booleans are integers here.
  template <typename T>
  tensorflow::Status GetAttr(const std::string& name, T* value) const {
    if constexpr (std::is_same_v<T, int>) {
      int64_t number = 0;
      TF_RETURN_IF_ERROR(GetAttr(name, &number));
      *value = static_cast<int>(number);
    } else {
      const auto found = values_.find(name);
      const T* held =
          found == values_.end() ? nullptr : std::get_if<T>(&found->second);
      if (held == nullptr) {
        return tensorflow::errors::InvalidArgument(
            "Expected an attribute `", name,
            "` of the op's type. Received: none, or one of another type");
      }
      *value = *held;
    }
    return tensorflow::Status();
  }

 private:
  std::map<std::string, Value> values_;
};

// What a call runs on: threads of XLA's pool, or XLA's stream.
#ifdef TF_DEFORM_CUDA
using XlaExecutor = std::variant<ParallelFor, CudaStream>;
#else
using XlaExecutor = std::variant<ParallelFor>;
#endif

// Memory of a call. A result without elements is null: nothing is to be
// computed. While XLA compiles, results tell only whether they are null.
struct XlaBuffers {
  std::vector<const void*> operands;
  std::vector<void*> results;
  void* workspace = nullptr;
};

// One call of an op. Judge comes first, and keeps what the others need.
class XlaCall {
 public:
  virtual ~XlaCall() = default;

  // Judges attributes and the operands' shapes; tells the results' shapes.
  virtual tensorflow::Status Judge(const XlaAttributes& attributes,
                                   const std::vector<Shape>& operands,
                                   std::vector<Shape>* results) = 0;

  // Bytes of scratch that Run needs with such an executor.
  virtual int64_t WorkspaceBytes(DataType type, const XlaBuffers& buffers,
                                 const XlaExecutor& executor) const = 0;

  // Writes the results.
  virtual Status Run(DataType type, const XlaBuffers& buffers,
                     const XlaExecutor& executor) const = 0;
};

// A shape of known dimensions.
Shape KnownShape(const std::vector<int64_t>& dims);

// An op's number of operands, of which the caller may be anyone.
tensorflow::Status CheckOperands(const std::vector<Shape>& operands,
                                 int expected);

// Empties the shapes of gradients that the attribute `wanted` says no to.
tensorflow::Status KeepWanted(const XlaAttributes& attributes,
                              std::vector<Shape>* gradients);

// Compiles an op into a custom call.
tensorflow::OpKernel* MakeXlaKernel(
    tensorflow::OpKernelConstruction* construction,
    std::unique_ptr<XlaCall> (*make)());

// What XLA calls, on each platform.
XLA_FFI_Error* RunOnHost(XlaCall* call, XLA_FFI_CallFrame* frame);
XLA_FFI_Error* RunOnCuda(XlaCall* call, XLA_FFI_CallFrame* frame);

// Registers an op with XLA: how to compile it, and what to call.
struct XlaRegistrar {
  XlaRegistrar(const char* op,
               tensorflow::OpKernel* (*make)(tensorflow::OpKernelConstruction*),
               XLA_FFI_Error* (*on_host)(XLA_FFI_CallFrame*),
               XLA_FFI_Error* (*on_cuda)(XLA_FFI_CallFrame*));
  // An op without attributes that compiles into nothing.
  XlaRegistrar(const char* op, tensorflow::OpKernel* (*make)(
                                   tensorflow::OpKernelConstruction*));
};

// Registers the op `name`, whose calls are of the class Call.
template <typename Call>
XlaRegistrar RegisterXla(const char* name) {
  return XlaRegistrar(
      name,
      [](tensorflow::OpKernelConstruction* construction) {
        return MakeXlaKernel(construction, []() -> std::unique_ptr<XlaCall> {
          return std::make_unique<Call>();
        });
      },
      [](XLA_FFI_CallFrame* frame) {
        Call call;
        return RunOnHost(&call, frame);
      },
      [](XLA_FFI_CallFrame* frame) {
        Call call;
        return RunOnCuda(&call, frame);
      });
}

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_XLA_GLUE_H_
