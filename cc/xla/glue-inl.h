// SPDX-License-Identifier: Apache-2.0
// Connects the ops with XLA: compilation, handlers, threads.

#ifndef TF_DEFORM_CC_XLA_GLUE_INL_H_
#define TF_DEFORM_CC_XLA_GLUE_INL_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cc/tf/library.h"
#include "cc/tf/loop.h"
#include "cc/tf/marker_op.h"
#include "cc/tf/ops.h"
#include "cc/xla/op_call.h"
#include "tensorflow/compiler/tf2xla/type_util.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tensorflow/core/framework/kernel_def_builder.h"
#include "tensorflow/core/framework/node_def_util.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/cpu_info.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/tensor_float_32_utils.h"
#include "tensorflow/core/public/version.h"
#include "tensorflow/core/util/determinism.h"
#include "xla/ffi/api/c_api.h"
#include "xla/shape.h"
#include "xla/shape_util.h"
#if __has_include("xla/hlo/builder/xla_builder.h")
#include "xla/hlo/builder/xla_builder.h"
#else  // TensorFlow 2.18 and older
#include "xla/client/xla_builder.h"
#endif

// Tells what XLA's C interface has. TensorFlow 2.17 hands a call no threads,
// and threads of our own would compete with TensorFlow's, so there the caller
// does all the work. 2.18 does not say how many threads there are. The version
// of the interface is no help, as XLA_FFI_API_MINOR is 1 from 2.18 to 2.20;
// TF_MINOR_VERSION is defined up to 2.19.
#if !defined(TF_MINOR_VERSION) || TF_MINOR_VERSION >= 18
#define TF_DEFORM_XLA_HAS_POOL
#endif
#if !defined(TF_MINOR_VERSION) || TF_MINOR_VERSION >= 19
#define TF_DEFORM_XLA_COUNTS_THREADS
#endif

namespace xla::ffi {
// A function of TensorFlow's framework library, whose own header is internal.
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi

namespace tf_deform {
namespace {

// XLA aligns buffers for its own purposes. The core needs this alignment for
// scratch, on any device.
constexpr int64_t kWorkspaceAlignment = 256;

// Attributes of the custom call.
constexpr char kParams[] = "params";
constexpr char kWanted[] = "wanted";
constexpr char kNumWorkers[] = "num_workers";
constexpr char kAllowTf32[] = "allow_tf32";
constexpr char kDeterministic[] = "deterministic";

// Replaces the memory of a result while XLA compiles.
char some_memory;

// Returns one attribute as MLIR writes it in a dictionary.
std::string ToMlir(const char* name, int64_t value) {
  return std::string(name) + " = " + std::to_string(value) + " : i64";
}

std::string ToMlir(const char* name, const std::vector<int64_t>& values) {
  std::string text = std::string(name) + " = array<i64";
  const char* separator = ": ";
  for (int64_t value : values) {
    text += separator + std::to_string(value);
    separator = ", ";
  }
  return text + ">";
}

// Returns the devices for which XLA compiles the ops.
std::vector<absl::string_view> Devices() {
  std::vector<absl::string_view> devices = {tensorflow::DEVICE_CPU_XLA_JIT};
#ifdef TF_DEFORM_CUDA
  devices.push_back(tensorflow::DEVICE_GPU_XLA_JIT);
#endif
  return devices;
}

// Returns a shape whose dimensions are known, or unknown as in ShapeText.
Shape ToShape(const xla::Shape& shape) {
  Shape result;
  result.rank = static_cast<int>(shape.dimensions().size());
  for (int i = 0; i < std::min(result.rank, Shape::kMaxRank); ++i) {
    result.dims[i] = shape.is_dynamic_dimension(i) ? -1 : shape.dimensions()[i];
  }
  return result;
}

Shape ToShape(const XLA_FFI_Buffer& buffer) {
  Shape result;
  result.rank = static_cast<int>(buffer.rank);
  std::copy_n(buffer.dims, std::min(result.rank, Shape::kMaxRank), result.dims);
  return result;
}

int64_t Elements(const Shape& shape) {
  int64_t elements = 1;
  for (int axis = 0; axis < shape.rank; ++axis) elements *= shape.dim(axis);
  return elements;
}

class XlaKernel : public tensorflow::XlaOpKernel {
 public:
  XlaKernel(tensorflow::OpKernelConstruction* construction,
            std::unique_ptr<XlaCall> (*make)())
      : XlaOpKernel(construction), make_(make) {
    tensorflow::DataType type, coordinates;
    OP_REQUIRES_OK(construction, construction->GetAttr("T", &type));
    OP_REQUIRES_OK(construction, construction->GetAttr("Tcoord", &coordinates));
    OP_REQUIRES(construction,
                (type == tensorflow::DT_DOUBLE) ==
                    (coordinates == tensorflow::DT_DOUBLE),
                tensorflow::errors::InvalidArgument(
                    "Expected coordinates to be float64 if `inputs` are, and "
                    "float32 otherwise. Received: `inputs` of ",
                    tensorflow::DataTypeString(type), ", coordinates of ",
                    tensorflow::DataTypeString(coordinates)));
    OP_REQUIRES_OK(construction,
                   make_()->Read(construction, &params_, &wanted_));
    const tensorflow::OpDef* op;
    OP_REQUIRES_OK(construction, tensorflow::OpRegistry::Global()->LookUpOpDef(
                                     construction->def().op(), &op));
    tensorflow::NameRangeMap inputs;
    OP_REQUIRES_OK(construction, tensorflow::NameRangesForNode(
                                     tensorflow::AttrSlice(construction->def()),
                                     *op, &inputs, nullptr));
    names_.resize(construction->num_inputs());
    for (const auto& [name, range] : inputs) {
      for (int i = range.first; i < range.second; ++i) names_[i] = name;
    }
  }

  void Compile(tensorflow::XlaOpKernelContext* context) override {
    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> operand_layouts, result_layouts;
    std::vector<Shape> operand_shapes, result_shapes;
    for (int i = 0; i < context->num_inputs(); ++i) {
      const auto shape = context->InputXlaShape(i);
      OP_REQUIRES_OK(context, shape.status());
      operand_shapes.push_back(ToShape(*shape));
      OP_REQUIRES(
          context, !shape->is_dynamic(),
          tensorflow::errors::InvalidArgument(
              "Expected `", names_[i],
              "` to have a shape that is known when XLA compiles (with "
              "jit_compile=True): pad it to a fixed size. Received: ",
              names_[i], ".shape=", ShapeText(operand_shapes.back()).text));
      operands.push_back(context->Input(i));
      operand_layouts.push_back(xla::ShapeUtil::MakeShapeWithDescendingLayout(
          shape->element_type(), shape->dimensions()));
    }
    const std::unique_ptr<XlaCall> call = make_();
    OP_REQUIRES_OK(context, ToTensorFlow(call->Bind(params_, wanted_)));
    OP_REQUIRES_OK(context,
                   ToTensorFlow(call->Judge(operand_shapes, &result_shapes)));
    XlaBuffers buffers;
    for (int i = 0; i < context->num_outputs(); ++i) {
      const Shape& shape = result_shapes[i];
      xla::PrimitiveType type;
      OP_REQUIRES_OK(context, tensorflow::DataTypeToPrimitiveType(
                                  context->expected_output_dtype(i), &type));
      result_layouts.push_back(xla::ShapeUtil::MakeShapeWithDescendingLayout(
          type, absl::MakeConstSpan(shape.dims, shape.rank)));
      buffers.results.push_back(Elements(shape) > 0 ? &some_memory : nullptr);
    }
    std::string attributes = "{" + ToMlir(kParams, params_);
    if (!wanted_.empty()) attributes += ", " + ToMlir(kWanted, wanted_);
    const XlaExecutor executor = Plan(context, &attributes);
    const int64_t bytes = call->WorkspaceBytes(
        ToDataType(context->input_type(0)), buffers, executor);
    result_layouts.push_back(xla::ShapeUtil::MakeShapeWithDescendingLayout(
        xla::U8, {bytes + kWorkspaceAlignment}));
    const xla::XlaOp results = xla::CustomCallWithLayout(
        context->builder(), type_string(), operands,
        xla::ShapeUtil::MakeTupleShape(result_layouts), operand_layouts,
        attributes + "}", /*has_side_effect=*/false,
        /*output_operand_aliasing=*/{}, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE,
        xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (int i = 0; i < context->num_outputs(); ++i) {
      context->SetOutput(i, xla::GetTupleElement(results, i));
    }
  }

 private:
  // Returns the executor of the call, as far as its workspace depends on it,
  // and adds it to `attributes`.
  static XlaExecutor Plan(tensorflow::XlaOpKernelContext* context,
                          std::string* attributes) {
#ifdef TF_DEFORM_CUDA
    if (context->compiler()->options().device_type.type_string() ==
        tensorflow::DEVICE_GPU_XLA_JIT) {
      CudaStream stream;
      stream.allow_tf32 = tensorflow::tensor_float_32_execution_enabled();
      stream.deterministic = tensorflow::OpDeterminismRequired();
      *attributes += ", " + ToMlir(kAllowTf32, stream.allow_tf32) + ", " +
                     ToMlir(kDeterministic, stream.deterministic);
      return stream;
    }
#endif
    ParallelFor parallel_for;
#ifdef TF_DEFORM_XLA_HAS_POOL
    // The pool is not known yet: plans for as many threads as there are
    // processors.
    parallel_for.num_workers = std::max(1, tensorflow::port::MaxParallelism());
#endif
    *attributes += ", " + ToMlir(kNumWorkers, parallel_for.num_workers);
    return parallel_for;
  }

  std::unique_ptr<XlaCall> (*const make_)();
  std::vector<int64_t> params_, wanted_;
  std::vector<std::string> names_;  // of the inputs
};

// XLA's arguments of a function of its C interface.
template <typename Args>
Args MakeArgs(size_t struct_size) {
  Args args = {};
  args.struct_size = struct_size;
  return args;
}

// Returns whether a function of the interface succeeded.
bool Succeeded(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  if (error == nullptr) return true;
  auto args = MakeArgs<XLA_FFI_Error_Destroy_Args>(
      XLA_FFI_Error_Destroy_Args_STRUCT_SIZE);
  args.error = error;
  api->XLA_FFI_Error_Destroy(&args);
  return false;
}

XLA_FFI_Error* ToXla(const XLA_FFI_Api* api, const Status& status) {
  if (status.ok()) return nullptr;
  auto args = MakeArgs<XLA_FFI_Error_Create_Args>(
      XLA_FFI_Error_Create_Args_STRUCT_SIZE);
  args.message = status.message;
  args.errc = status.code == Status::kInvalidArgument
                  ? XLA_FFI_Error_Code_INVALID_ARGUMENT
                  : XLA_FFI_Error_Code_INTERNAL;
  return api->XLA_FFI_Error_Create(&args);
}

// Returns the integers of an attribute of the call; none if the attribute is
// missing or holds something else.
XlaCall::Words FindWords(const XLA_FFI_Attrs& attrs, absl::string_view name) {
  for (int64_t i = 0; i < attrs.size; ++i) {
    if (name != absl::string_view(attrs.names[i]->ptr, attrs.names[i]->len)) {
      continue;
    }
    if (attrs.types[i] == XLA_FFI_AttrType_SCALAR) {
      const auto* scalar = static_cast<const XLA_FFI_Scalar*>(attrs.attrs[i]);
      if (scalar->dtype != XLA_FFI_DataType_S64) break;
      return {static_cast<const int64_t*>(scalar->value), 1};
    }
    if (attrs.types[i] == XLA_FFI_AttrType_ARRAY) {
      const auto* array = static_cast<const XLA_FFI_Array*>(attrs.attrs[i]);
      if (array->dtype != XLA_FFI_DataType_S64) break;
      return {static_cast<const int64_t*>(array->data), array->size};
    }
    break;
  }
  return {};
}

Status FindNumber(const XLA_FFI_Attrs& attrs, const char* name,
                  int64_t* value) {
  const XlaCall::Words words = FindWords(attrs, name);
  if (words.size() != 1) {
    return InvalidArgument(
        "Expected an attribute `%s` of the op's type. Received: none, or one "
        "of another type",
        name);
  }
  *value = words[0];
  return Status();
}

Status ToDataType(XLA_FFI_DataType type, DataType* result) {
  switch (type) {
    case XLA_FFI_DataType_F16:
      *result = DataType::kFloat16;
      break;
    case XLA_FFI_DataType_BF16:
      *result = DataType::kBFloat16;
      break;
    case XLA_FFI_DataType_F32:
      *result = DataType::kFloat32;
      break;
    case XLA_FFI_DataType_F64:
      *result = DataType::kFloat64;
      break;
    default:
      return InvalidArgument(
          "Expected `inputs` to be float16, bfloat16, float32 or float64. "
          "Received: XLA's type %d",
          static_cast<int>(type));
  }
  return Status();
}

#ifdef TF_DEFORM_XLA_HAS_POOL
// XLA's pool and how many workers the workspace is made for.
struct Pool {
  const XLA_FFI_CallFrame* frame;
  int64_t max_workers;
};

// Returns the number of threads of XLA's pool, at most `max_workers`.
int64_t NumThreads(const XLA_FFI_CallFrame& frame, int64_t max_workers) {
#ifdef TF_DEFORM_XLA_COUNTS_THREADS
  int64_t number = 0;
  auto args = MakeArgs<XLA_FFI_ThreadPool_NumThreads_Args>(
      XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE);
  args.ctx = frame.ctx;
  args.num_threads = &number;
  return Succeeded(frame.api, frame.api->XLA_FFI_ThreadPool_NumThreads(&args))
             ? std::min(number, max_workers)
             : 1;
#else
  // Workers that find no thread start late, when there is no task left.
  return max_workers;
#endif
}

// The caller takes part: it may be a thread of the pool, and no other thread
// might be free. It waits for tasks, not for workers.
void RunOnXlaPool(void* context, int64_t num_tasks, ParallelFor::Task task,
                  void* argument) {
  using Shared = std::shared_ptr<Loop>;
  const auto* pool = static_cast<const Pool*>(context);
  const XLA_FFI_Api* const api = pool->frame->api;
  const Shared loop =
      std::make_shared<Loop>(pool->max_workers, num_tasks, task, argument);
  for (int helper = 1; helper < loop->num_workers(); ++helper) {
    auto owner = std::make_unique<Shared>(loop);
    auto args = MakeArgs<XLA_FFI_ThreadPool_Schedule_Args>(
        XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE);
    args.ctx = pool->frame->ctx;
    args.task = [](void* data) {
      const std::unique_ptr<Shared> owner(static_cast<Shared*>(data));
      (*owner)->Work();
    };
    args.data = owner.get();
    if (!Succeeded(api, api->XLA_FFI_ThreadPool_Schedule(&args))) break;
    owner.release();
  }
  loop->Work();
  loop->Wait();
}
#endif

// Runs a call on the executor.
Status Run(XlaCall* call, const XLA_FFI_CallFrame& frame,
           const XlaExecutor& executor) {
  TF_DEFORM_RETURN_IF_ERROR(call->Bind(FindWords(frame.attrs, kParams),
                                       FindWords(frame.attrs, kWanted)));
  std::vector<Shape> operand_shapes, result_shapes;
  XlaBuffers buffers;
  DataType type = DataType::kFloat32;
  for (int64_t i = 0; i < frame.args.size; ++i) {
    const auto& buffer =
        *static_cast<const XLA_FFI_Buffer*>(frame.args.args[i]);
    operand_shapes.push_back(ToShape(buffer));
    buffers.operands.push_back(buffer.data);
    if (i == 0) TF_DEFORM_RETURN_IF_ERROR(ToDataType(buffer.dtype, &type));
  }
  TF_DEFORM_RETURN_IF_ERROR(call->Judge(operand_shapes, &result_shapes));
  const int64_t num_results = static_cast<int64_t>(result_shapes.size());
  if (frame.rets.size != num_results + 1) {
    return InvalidArgument(
        "Expected %d results and a workspace. Received: %d results",
        static_cast<int>(num_results), static_cast<int>(frame.rets.size));
  }
  for (int64_t i = 0; i < num_results; ++i) {
    const auto& buffer =
        *static_cast<const XLA_FFI_Buffer*>(frame.rets.rets[i]);
    const Shape shape = ToShape(buffer);
    const Shape& expected = result_shapes[i];
    if (shape.rank != expected.rank ||
        !std::equal(shape.dims, shape.dims + shape.rank, expected.dims)) {
      return InvalidArgument(
          "Expected result %d to have the shape %s. Received: %s",
          static_cast<int>(i), ShapeText(expected).text, ShapeText(shape).text);
    }
    buffers.results.push_back(Elements(shape) > 0 ? buffer.data : nullptr);
  }
  const auto& memory =
      *static_cast<const XLA_FFI_Buffer*>(frame.rets.rets[num_results]);
  const int64_t size = memory.dtype == XLA_FFI_DataType_U8 && memory.rank == 1
                           ? memory.dims[0]
                           : 0;
  const int64_t bytes = call->WorkspaceBytes(type, buffers, executor);
  if (size < bytes + kWorkspaceAlignment) {
    return Internal(
        "Expected a workspace of %lld bytes and %lld to align it. Received: "
        "%lld",
        static_cast<long long>(bytes),
        static_cast<long long>(kWorkspaceAlignment),
        static_cast<long long>(size));
  }
  const auto address = reinterpret_cast<uintptr_t>(memory.data);
  buffers.workspace =
      reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) &
                              ~uintptr_t{kWorkspaceAlignment - 1});
  return call->Run(type, buffers, executor);
}

Status RunOnHost(XlaCall* call, const XLA_FFI_CallFrame& frame) {
  int64_t max_workers = 1;
  TF_DEFORM_RETURN_IF_ERROR(FindNumber(frame.attrs, kNumWorkers, &max_workers));
  ParallelFor parallel_for;
#ifdef TF_DEFORM_XLA_HAS_POOL
  Pool pool{&frame, NumThreads(frame, max_workers)};
  if (pool.max_workers > 1) {
    parallel_for.num_workers = static_cast<int>(pool.max_workers);
    parallel_for.context = &pool;
    parallel_for.run = RunOnXlaPool;
  }
#endif
  return Run(call, frame, parallel_for);
}

#ifdef TF_DEFORM_CUDA
Status RunOnCuda(XlaCall* call, const XLA_FFI_CallFrame& frame) {
  int64_t allow_tf32 = 0, deterministic = 0;
  TF_DEFORM_RETURN_IF_ERROR(FindNumber(frame.attrs, kAllowTf32, &allow_tf32));
  TF_DEFORM_RETURN_IF_ERROR(
      FindNumber(frame.attrs, kDeterministic, &deterministic));
  auto args =
      MakeArgs<XLA_FFI_Stream_Get_Args>(XLA_FFI_Stream_Get_Args_STRUCT_SIZE);
  args.ctx = frame.ctx;
  if (!Succeeded(frame.api, frame.api->XLA_FFI_Stream_Get(&args))) {
    return Internal("Expected XLA to have a stream. Received: none");
  }
  return Run(call, frame,
             CudaStream{args.stream, allow_tf32 != 0, deterministic != 0});
}
#endif

// Handles a call of XLA by `run`, which serves one platform. Before XLA
// registers a handler, it asks for the version of the interface that the
// handler was compiled with; version 0.0, of TensorFlow 2.17, does not ask.
template <typename Call, Status (*run)(XlaCall*, const XLA_FFI_CallFrame&)>
XLA_FFI_Error* Handle(XLA_FFI_CallFrame* frame) {
#if XLA_FFI_API_MAJOR > 0 || XLA_FFI_API_MINOR > 0
  if (frame->extension_start != nullptr &&
      frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* const metadata =
        reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)
            ->metadata;
    // All other fields become zero: the handler has no traits and no state.
    *metadata = {metadata->struct_size,
                 {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                  XLA_FFI_API_MINOR}};
    return nullptr;
  }
#endif
  Call call;
  return ToXla(frame->api, run(&call, *frame));
}

void RegisterHandler(const std::string& op, absl::string_view platform,
                     XLA_FFI_Handler* handler) {
  const XLA_FFI_Api* const api = xla::ffi::GetXlaFfiApi();
  auto args = MakeArgs<XLA_FFI_Handler_Register_Args>(
      XLA_FFI_Handler_Register_Args_STRUCT_SIZE);
  args.name = {op.data(), op.size()};
  args.platform = {platform.data(), platform.size()};
  args.bundle.execute = handler;
  // The result does not matter: without a handler XLA fails to compile a call,
  // and says why.
  Succeeded(api, api->XLA_FFI_Handler_Register(&args));
}

using CreateKernel =
    tensorflow::OpKernel* (*)(tensorflow::OpKernelConstruction*);
using Types = std::vector<tensorflow::DataType>;

// Tells whether XLA has made its list of the kernels that it compiles for a
// device. It makes the list once, when TensorFlow's first op runs.
bool HasMadeItsList(absl::string_view device) {
  const tensorflow::KernelList known =
      tensorflow::GetRegisteredKernelsForOp("Abs");
  return std::any_of(known.kernel().begin(), known.kernel().end(),
                     [&](const tensorflow::KernelDef& kernel) {
                       return kernel.device_type() == device;
                     });
}

// Registers an op's compilation with XLA. One registration serves all types:
// XLA takes no second registration for a device. Where the library is loaded
// after XLA has made its list, adds to the list what would be in it.
void RegisterCompilation(const std::string& op,
                         const std::map<std::string, Types>& types,
                         CreateKernel create) {
  auto registration = tensorflow::XlaOpRegistrationBuilder::Name(op);
  registration.Device(Devices());
  for (const auto& [name, allowed] : types) {
    registration.TypeConstraint(name, allowed);
  }
  tensorflow::XlaOpRegistrar(registration.Build(create));
  for (const absl::string_view device : Devices()) {
    if (!HasMadeItsList(device)) continue;
    tensorflow::KernelDefBuilder kernel(op.c_str());
    kernel.Device(device.data());
    for (const auto& [name, allowed] : types) {
      kernel.TypeConstraint(name.c_str(), allowed);
    }
    // The registry owns the description.
    tensorflow::kernel_factory::OpKernelRegistrar(kernel.Build(), "XlaKernel",
                                                  create);
  }
}

// Registers an op, or its gradient op, with XLA: its compilation, and its
// handlers.
template <typename Op, bool kIsGradient>
void RegisterCall() {
  using Call = OpCall<Op, kIsGradient>;
  const std::string op = OpName<Op>(kIsGradient);
  RegisterCompilation(
      op,
      {{"T",
        {tensorflow::DT_HALF, tensorflow::DT_BFLOAT16, tensorflow::DT_FLOAT,
         tensorflow::DT_DOUBLE}},
       {"Tcoord", {tensorflow::DT_FLOAT, tensorflow::DT_DOUBLE}}},
      [](tensorflow::OpKernelConstruction* construction)
          -> tensorflow::OpKernel* {
        return new XlaKernel(construction, []() -> std::unique_ptr<XlaCall> {
          return std::make_unique<Call>();
        });
      });
  RegisterHandler(op, "Host", Handle<Call, RunOnHost>);
#ifdef TF_DEFORM_CUDA
  RegisterHandler(op, "CUDA", Handle<Call, RunOnCuda>);
#endif
}

const bool is_registered = [] {
  if (!RegistersOps()) return false;
#define TF_DEFORM_REGISTER_CALLS(Op) \
  RegisterCall<Op, false>();         \
  RegisterCall<Op, true>()
  TF_DEFORM_FOR_EACH_OP(TF_DEFORM_REGISTER_CALLS);
  // XLA does not prune the marker, which compiles into nothing.
  RegisterCompilation(
      kMarker, {},
      [](tensorflow::OpKernelConstruction* construction)
          -> tensorflow::OpKernel* { return new MarkerKernel(construction); });
  return true;
}();

}  // namespace
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_XLA_GLUE_INL_H_
