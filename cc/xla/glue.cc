// SPDX-License-Identifier: Apache-2.0
// What every op's XLA glue shares: compilation, handlers, threads.

#include "cc/xla/glue.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cc/tf/library.h"
#include "cc/tf/loop.h"
#include "tensorflow/compiler/tf2xla/type_util.h"
#include "tensorflow/compiler/tf2xla/xla_compiler.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tensorflow/core/framework/node_def_util.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/cpu_info.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/tensor_float_32_utils.h"
#include "tensorflow/core/util/determinism.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape.h"
#include "xla/shape_util.h"

namespace xla::ffi {
// Of TensorFlow's framework library; its own header is not for others.
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi

namespace tf_deform {
namespace {

namespace ffi = ::xla::ffi;

// XLA aligns buffers for its own purposes. The core wants this for scratch, on
// any device.
constexpr int64_t kWorkspaceAlignment = 256;

// Attributes of the custom call that are not the op's.
constexpr char kNumWorkers[] = "num_workers";
constexpr char kAllowTf32[] = "allow_tf32";
constexpr char kDeterministic[] = "deterministic";

// Stands for the memory of a result while XLA compiles.
char some_memory;

// Attributes as MLIR writes a dictionary.
std::string ToMlir(const XlaAttributes& attributes) {
  struct Printer {
    std::string operator()(int64_t value) const {
      return std::to_string(value) + " : i64";
    }
    // Names of options, which need no escapes: they have been judged.
    std::string operator()(const std::string& value) const {
      return "\"" + value + "\"";
    }
    std::string operator()(const std::vector<int64_t>& values) const {
      std::string text = "array<i64";
      const char* separator = ": ";
      for (int64_t value : values) {
        text += separator + std::to_string(value);
        separator = ", ";
      }
      return text + ">";
    }
    std::string operator()(const std::vector<float>& values) const {
      std::string text = "array<f32";
      const char* separator = ": ";
      for (float value : values) {
        char digits[32];  // enough of them to read the same float back
        snprintf(digits, sizeof(digits), "%.8e", static_cast<double>(value));
        text += separator + std::string(digits);
        separator = ", ";
      }
      return text + ">";
    }
  };
  std::string text = "{";
  const char* separator = "";
  for (const auto& [name, value] : attributes.values()) {
    text += separator + name + " = " + std::visit(Printer(), value);
    separator = ", ";
  }
  return text + "}";
}

XlaAttributes FromFrame(const XLA_FFI_Attrs& attrs) {
  XlaAttributes attributes;
  for (int64_t i = 0; i < attrs.size; ++i) {
    const std::string name(attrs.names[i]->ptr, attrs.names[i]->len);
    const void* const attr = attrs.attrs[i];
    switch (attrs.types[i]) {
      case XLA_FFI_AttrType_SCALAR: {
        const auto* scalar = static_cast<const XLA_FFI_Scalar*>(attr);
        if (scalar->dtype == XLA_FFI_DataType_S64) {
          attributes.Set(name, *static_cast<const int64_t*>(scalar->value));
        }
        break;
      }
      case XLA_FFI_AttrType_STRING: {
        const auto* span = static_cast<const XLA_FFI_ByteSpan*>(attr);
        attributes.Set(name, std::string(span->ptr, span->len));
        break;
      }
      case XLA_FFI_AttrType_ARRAY: {
        const auto* array = static_cast<const XLA_FFI_Array*>(attr);
        if (array->dtype == XLA_FFI_DataType_S64) {
          const auto* data = static_cast<const int64_t*>(array->data);
          attributes.Set(name, std::vector<int64_t>(data, data + array->size));
        } else if (array->dtype == XLA_FFI_DataType_F32) {
          const auto* data = static_cast<const float*>(array->data);
          attributes.Set(name, std::vector<float>(data, data + array->size));
        }
        break;
      }
      default:
        break;  // not of ours: whoever looks for it says that it is missing
    }
  }
  return attributes;
}

// The value of a node's attribute, whose C++ type is T.
template <typename T>
tensorflow::Status Copy(tensorflow::OpKernelConstruction* construction,
                        const std::string& name, XlaAttributes* attributes) {
  T value{};
  TF_RETURN_IF_ERROR(construction->GetAttr(name, &value));
  attributes->Set(name, std::move(value));
  return tensorflow::Status();
}

// All attributes of a node but types.
tensorflow::Status FromNode(tensorflow::OpKernelConstruction* construction,
                            const tensorflow::OpDef& op,
                            XlaAttributes* attributes) {
  for (const auto& attr : op.attr()) {
    const std::string& name = attr.name();
    tensorflow::Status status;
    if (attr.type() == "type") {
      continue;
    } else if (attr.type() == "int") {
      status = Copy<int64_t>(construction, name, attributes);
    } else if (attr.type() == "string") {
      status = Copy<std::string>(construction, name, attributes);
    } else if (attr.type() == "list(int)") {
      status = Copy<std::vector<int64_t>>(construction, name, attributes);
    } else if (attr.type() == "list(float)") {
      status = Copy<std::vector<float>>(construction, name, attributes);
    } else if (attr.type() == "list(bool)") {
      std::vector<bool> values;
      status = construction->GetAttr(name, &values);
      attributes->Set(name, std::vector<int64_t>(values.begin(), values.end()));
    } else {
      status = tensorflow::errors::Internal(
          "Expected attributes of types that XLA glue knows. Received: `", name,
          "` of type ", attr.type());
    }
    TF_RETURN_IF_ERROR(status);
  }
  return tensorflow::Status();
}

// What XLA compiles the ops for.
std::vector<absl::string_view> Devices() {
  std::vector<absl::string_view> devices = {tensorflow::DEVICE_CPU_XLA_JIT};
#ifdef TF_DEFORM_CUDA
  devices.push_back(tensorflow::DEVICE_GPU_XLA_JIT);
#endif
  return devices;
}

// A shape whose dimensions are known, or unknown as in ShapeText.
Shape ToShape(const xla::Shape& shape) {
  Shape result;
  result.rank = static_cast<int>(shape.dimensions().size());
  for (int i = 0; i < std::min(result.rank, Shape::kMaxRank); ++i) {
    result.dims[i] = shape.is_dynamic_dimension(i) ? -1 : shape.dimensions()[i];
  }
  return result;
}

int64_t Elements(const Shape& shape) {
  int64_t elements = 1;
  for (int axis = 0; axis < shape.rank; ++axis) elements *= shape.dim(axis);
  return elements;
}

tensorflow::Status ToDataType(xla::PrimitiveType type, DataType* result) {
  switch (type) {
    case xla::F16:
      *result = DataType::kFloat16;
      break;
    case xla::BF16:
      *result = DataType::kBFloat16;
      break;
    case xla::F32:
      *result = DataType::kFloat32;
      break;
    case xla::F64:
      *result = DataType::kFloat64;
      break;
    default:
      return tensorflow::errors::InvalidArgument(
          "Expected `inputs` to be float16, bfloat16, float32 or float64. "
          "Received: ",
          xla::PrimitiveType_Name(type));
  }
  return tensorflow::Status();
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
    const tensorflow::OpDef* op;
    OP_REQUIRES_OK(construction, tensorflow::OpRegistry::Global()->LookUpOpDef(
                                     construction->def().op(), &op));
    OP_REQUIRES_OK(construction, FromNode(construction, *op, &attributes_));
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
    OP_REQUIRES_OK(context,
                   call->Judge(attributes_, operand_shapes, &result_shapes));
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
    DataType type;
    OP_REQUIRES_OK(context, ToDataType(context->input_xla_type(0), &type));
    XlaAttributes attributes = attributes_;
    const int64_t bytes =
        call->WorkspaceBytes(type, buffers, Plan(context, &attributes));
    result_layouts.push_back(xla::ShapeUtil::MakeShapeWithDescendingLayout(
        xla::U8, {bytes + kWorkspaceAlignment}));
    const xla::XlaOp results = xla::CustomCallWithLayout(
        context->builder(), type_string(), operands,
        xla::ShapeUtil::MakeTupleShape(result_layouts), operand_layouts,
        ToMlir(attributes), /*has_side_effect=*/false,
        /*output_operand_aliasing=*/{}, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE,
        xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (int i = 0; i < context->num_outputs(); ++i) {
      context->SetOutput(i, xla::GetTupleElement(results, i));
    }
  }

 private:
  // What the call will run on, as far as its workspace depends on it; also
  // written to `attributes`.
  static XlaExecutor Plan(tensorflow::XlaOpKernelContext* context,
                          XlaAttributes* attributes) {
#ifdef TF_DEFORM_CUDA
    if (context->compiler()->options().device_type.type_string() ==
        tensorflow::DEVICE_GPU_XLA_JIT) {
      CudaStream stream;
      stream.allow_tf32 = tensorflow::tensor_float_32_execution_enabled();
      stream.deterministic = tensorflow::OpDeterminismRequired();
      attributes->Set(kAllowTf32, int64_t{stream.allow_tf32});
      attributes->Set(kDeterministic, int64_t{stream.deterministic});
      return stream;
    }
#endif
    // The pool is not known yet: as many threads as there are processors.
    ParallelFor parallel_for;
    parallel_for.num_workers = std::max(1, tensorflow::port::MaxParallelism());
    attributes->Set(kNumWorkers, int64_t{parallel_for.num_workers});
    return parallel_for;
  }

  std::unique_ptr<XlaCall> (*const make_)();
  XlaAttributes attributes_;
  std::vector<std::string> names_;  // of the inputs
};

ffi::Error ToXla(const tensorflow::Status& status) {
  if (status.ok()) return ffi::Error::Success();
  return ffi::Error(static_cast<ffi::ErrorCode>(status.code()),
                    std::string(status.message()));
}

// XLA's pool and how many workers the workspace is made for.
struct Pool {
  ffi::ThreadPool threads;
  int64_t max_workers;
};

// The caller takes part, as it may be a thread of the pool, for which nobody
// else might be left. It waits for tasks, not for workers.
void RunOnPool(void* context, int64_t num_tasks, ParallelFor::Task task,
               void* argument) {
  auto* pool = static_cast<Pool*>(context);
  const auto loop =
      std::make_shared<Loop>(pool->max_workers, num_tasks, task, argument);
  for (int helper = 1; helper < loop->num_workers(); ++helper) {
    pool->threads.Schedule([loop] { loop->Work(); });
  }
  loop->Work();
  loop->Wait();
}

// Runs a call on what `executor` says.
tensorflow::Status Run(XlaCall* call, const XLA_FFI_CallFrame& frame,
                       const XlaAttributes& attributes,
                       const XlaExecutor& executor) {
  std::vector<Shape> operand_shapes, result_shapes;
  XlaBuffers buffers;
  DataType type = DataType::kFloat32;
  for (int64_t i = 0; i < frame.args.size; ++i) {
    const ffi::AnyBuffer buffer(
        static_cast<const XLA_FFI_Buffer*>(frame.args.args[i]));
    operand_shapes.push_back(
        KnownShape({buffer.dimensions().begin(), buffer.dimensions().end()}));
    buffers.operands.push_back(buffer.untyped_data());
    if (i == 0) {
      TF_RETURN_IF_ERROR(ToDataType(
          static_cast<xla::PrimitiveType>(buffer.element_type()), &type));
    }
  }
  TF_RETURN_IF_ERROR(call->Judge(attributes, operand_shapes, &result_shapes));
  const int64_t num_results = static_cast<int64_t>(result_shapes.size());
  if (frame.rets.size != num_results + 1) {
    return tensorflow::errors::InvalidArgument(
        "Expected ", num_results,
        " results and a workspace. Received: ", frame.rets.size, " results");
  }
  for (int64_t i = 0; i < num_results; ++i) {
    const ffi::AnyBuffer buffer(
        static_cast<const XLA_FFI_Buffer*>(frame.rets.rets[i]));
    const Shape shape =
        KnownShape({buffer.dimensions().begin(), buffer.dimensions().end()});
    const Shape& expected = result_shapes[i];
    if (shape.rank != expected.rank ||
        !std::equal(shape.dims, shape.dims + shape.rank, expected.dims)) {
      return tensorflow::errors::InvalidArgument(
          "Expected result ", i, " to have the shape ",
          ShapeText(expected).text, ". Received: ", ShapeText(shape).text);
    }
    buffers.results.push_back(buffer.element_count() > 0 ? buffer.untyped_data()
                                                         : nullptr);
  }
  const ffi::AnyBuffer memory(
      static_cast<const XLA_FFI_Buffer*>(frame.rets.rets[num_results]));
  const int64_t bytes = call->WorkspaceBytes(type, buffers, executor);
  if (static_cast<int64_t>(memory.size_bytes()) < bytes + kWorkspaceAlignment) {
    return tensorflow::errors::Internal(
        "Expected a workspace of ", bytes, " bytes and ", kWorkspaceAlignment,
        " to align it. Received: ", memory.size_bytes());
  }
  const auto address = reinterpret_cast<uintptr_t>(memory.untyped_data());
  buffers.workspace =
      reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) &
                              ~uintptr_t{kWorkspaceAlignment - 1});
  return ToTensorFlow(call->Run(type, buffers, executor));
}

}  // namespace

Shape KnownShape(const std::vector<int64_t>& dims) {
  Shape shape;
  shape.rank = static_cast<int>(dims.size());
  for (int i = 0; i < std::min(shape.rank, Shape::kMaxRank); ++i) {
    shape.dims[i] = dims[i];
  }
  return shape;
}

tensorflow::Status CheckOperands(const std::vector<Shape>& operands,
                                 int expected) {
  if (static_cast<int>(operands.size()) == expected) {
    return tensorflow::Status();
  }
  return tensorflow::errors::InvalidArgument(
      "Expected ", expected, " operands. Received: ", operands.size());
}

tensorflow::Status KeepWanted(const XlaAttributes& attributes,
                              std::vector<Shape>* gradients) {
  std::vector<int64_t> wanted;
  TF_RETURN_IF_ERROR(attributes.GetAttr("wanted", &wanted));
  TF_RETURN_IF_ERROR(CheckWanted({wanted.begin(), wanted.end()},
                                 static_cast<int>(gradients->size())));
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (!wanted[i]) (*gradients)[i] = KnownShape({0});
  }
  return tensorflow::Status();
}

tensorflow::OpKernel* MakeXlaKernel(
    tensorflow::OpKernelConstruction* construction,
    std::unique_ptr<XlaCall> (*make)()) {
  return new XlaKernel(construction, make);
}

XLA_FFI_Error* RunOnHost(XlaCall* call, XLA_FFI_CallFrame* frame) {
  const auto handler =
      ffi::Ffi::Bind()
          .Ctx<ffi::ThreadPool>()
          .RemainingArgs()
          .RemainingRets()
          .Attrs()
          .To([=](ffi::ThreadPool threads, ffi::RemainingArgs,
                  ffi::RemainingRets, ffi::Dictionary) {
            const XlaAttributes attributes = FromFrame(frame->attrs);
            int64_t max_workers = 1;
            const tensorflow::Status status =
                attributes.GetAttr(kNumWorkers, &max_workers);
            if (!status.ok()) return ToXla(status);
            Pool pool{threads, std::min(threads.num_threads(), max_workers)};
            ParallelFor parallel_for;
            if (pool.max_workers > 1) {
              parallel_for.num_workers = static_cast<int>(pool.max_workers);
              parallel_for.context = &pool;
              parallel_for.run = RunOnPool;
            }
            return ToXla(Run(call, *frame, attributes, parallel_for));
          });
  return handler->Call(frame);
}

XLA_FFI_Error* RunOnCuda(XlaCall* call, XLA_FFI_CallFrame* frame) {
#ifdef TF_DEFORM_CUDA
  const auto handler =
      ffi::Ffi::Bind()
          .Ctx<ffi::PlatformStream<void*>>()
          .RemainingArgs()
          .RemainingRets()
          .Attrs()
          .To([=](void* stream, ffi::RemainingArgs, ffi::RemainingRets,
                  ffi::Dictionary) {
            const XlaAttributes attributes = FromFrame(frame->attrs);
            int64_t allow_tf32 = 0, deterministic = 0;
            tensorflow::Status status =
                attributes.GetAttr(kAllowTf32, &allow_tf32);
            if (status.ok()) {
              status = attributes.GetAttr(kDeterministic, &deterministic);
            }
            if (!status.ok()) return ToXla(status);
            return ToXla(
                Run(call, *frame, attributes,
                    CudaStream{stream, allow_tf32 != 0, deterministic != 0}));
          });
  return handler->Call(frame);
#else
  return nullptr;  // not registered
#endif
}

XlaRegistrar::XlaRegistrar(
    const char* op,
    tensorflow::OpKernel* (*make)(tensorflow::OpKernelConstruction*),
    XLA_FFI_Error* (*on_host)(XLA_FFI_CallFrame*),
    XLA_FFI_Error* (*on_cuda)(XLA_FFI_CallFrame*)) {
  if (!RegistersOps()) return;
  // One registration for all types: XLA takes no second one for a device.
  tensorflow::XlaOpRegistrar(
      tensorflow::XlaOpRegistrationBuilder::Name(op)
          .Device(Devices())
          .TypeConstraint("T", {tensorflow::DT_HALF, tensorflow::DT_BFLOAT16,
                                tensorflow::DT_FLOAT, tensorflow::DT_DOUBLE})
          .TypeConstraint("Tcoord",
                          {tensorflow::DT_FLOAT, tensorflow::DT_DOUBLE})
          .Build(make));
  ffi::Ffi::RegisterStaticHandler(ffi::GetXlaFfiApi(), op, "Host", on_host);
#ifdef TF_DEFORM_CUDA
  ffi::Ffi::RegisterStaticHandler(ffi::GetXlaFfiApi(), op, "CUDA", on_cuda);
#else
  static_cast<void>(on_cuda);
#endif
}

XlaRegistrar::XlaRegistrar(
    const char* op,
    tensorflow::OpKernel* (*make)(tensorflow::OpKernelConstruction*)) {
  if (!RegistersOps()) return;
  tensorflow::XlaOpRegistrar(
      tensorflow::XlaOpRegistrationBuilder::Name(op).Device(Devices()).Build(
          make));
}

}  // namespace tf_deform
