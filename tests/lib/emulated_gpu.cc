// SPDX-License-Identifier: Apache-2.0
// Gives TensorFlow and XLA a GPU that is this machine's memory and processor.
//
// TensorFlow loads it as a pluggable device named GPU:0, which runs the kernels
// that are registered for GPUs. Kernels that launch work by CUDA fail there; a
// tf_deform built with emulated kernels (tests/lib/emulated_nvcc.py) runs. Work
// is done at once, so streams and events have nothing to keep in order. Device
// memory starts as NaN.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "tensorflow/c/experimental/stream_executor/stream_executor.h"
#include "xla/ffi/api/c_api.h"

namespace xla::ffi {
// A function of TensorFlow's framework library; its header needs headers that
// the package lacks.
struct HandlerRegistration {
  XLA_FFI_Metadata metadata;
  XLA_FFI_Handler_Bundle bundle;
};
absl::StatusOr<HandlerRegistration> FindHandler(std::string_view name,
                                                std::string_view platform);
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi

namespace {

constexpr size_t kAlignment = 256;

void* Allocate(uint64_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* const memory = std::aligned_alloc(kAlignment, rounded);
  if (memory != nullptr) std::memset(memory, 0xff, rounded);
  return memory;
}

// Implements functions that only report success.
template <typename... Arguments>
void Succeed(const SP_Device*, Arguments..., TF_Status* status) {
  TF_SetStatus(status, TF_OK, "");
}

// Implements handles of streams, events and timers, which hold nothing.
template <typename Handle>
void Create(const SP_Device*, Handle* handle, TF_Status* status) {
  *handle = reinterpret_cast<Handle>(new char);
  TF_SetStatus(status, TF_OK, "");
}
template <typename Handle>
void Destroy(const SP_Device*, Handle handle) {
  delete reinterpret_cast<char*>(handle);
}

using Device = const SP_Device*;
using Memory = SP_DeviceMemoryBase*;
using ConstMemory = const SP_DeviceMemoryBase*;
using Platform = const SP_Platform*;

void* Address(void* host) { return host; }
const void* Address(const void* host) { return host; }
void* Address(Memory memory) { return memory->opaque; }
const void* Address(ConstMemory memory) { return memory->opaque; }

// Implements copies between host and device, in a stream or not.
template <typename To, typename From, typename... Stream>
void Copy(Device, Stream..., To to, From from, uint64_t bytes,
          TF_Status* status) {
  std::memcpy(Address(to), Address(from), bytes);
  TF_SetStatus(status, TF_OK, "");
}

template <typename Value>
void Fill(Device, SP_Stream, Memory to, Value value, uint64_t bytes,
          TF_Status* status) {
  std::fill_n(static_cast<Value*>(to->opaque), bytes / sizeof(value), value);
  TF_SetStatus(status, TF_OK, "");
}

void FillExecutor(SP_StreamExecutor* e) {
  e->struct_size = SP_STREAMEXECUTOR_STRUCT_SIZE;
  e->allocate = [](Device, uint64_t bytes, int64_t, Memory memory) {
    memory->struct_size = SP_DEVICE_MEMORY_BASE_STRUCT_SIZE;
    memory->opaque = Allocate(bytes);
    memory->size = bytes;
  };
  e->deallocate = [](Device, Memory memory) { std::free(memory->opaque); };
  e->host_memory_allocate = [](Device, uint64_t bytes) {
    return Allocate(bytes);
  };
  e->host_memory_deallocate = [](Device, void* memory) { std::free(memory); };
  e->get_allocator_stats = [](Device, SP_AllocatorStats*) -> TF_Bool {
    return 0;
  };
  e->device_memory_usage = [](Device, int64_t* free,
                              int64_t* total) -> TF_Bool {
    *free = *total = int64_t{1} << 31;
    return 1;
  };
  e->create_stream = Create<SP_Stream>;
  e->destroy_stream = Destroy<SP_Stream>;
  e->create_stream_dependency = Succeed<SP_Stream, SP_Stream>;
  e->get_stream_status = Succeed<SP_Stream>;
  e->create_event = Create<SP_Event>;
  e->destroy_event = Destroy<SP_Event>;
  e->get_event_status = [](Device, SP_Event) { return SE_EVENT_COMPLETE; };
  e->record_event = Succeed<SP_Stream, SP_Event>;
  e->wait_for_event = Succeed<SP_Stream, SP_Event>;
  e->create_timer = Create<SP_Timer>;
  e->destroy_timer = Destroy<SP_Timer>;
  e->start_timer = Succeed<SP_Stream, SP_Timer>;
  e->stop_timer = Succeed<SP_Stream, SP_Timer>;
  e->memcpy_dtoh = Copy<void*, ConstMemory, SP_Stream>;
  e->memcpy_htod = Copy<Memory, const void*, SP_Stream>;
  e->memcpy_dtod = Copy<Memory, ConstMemory, SP_Stream>;
  e->sync_memcpy_dtoh = Copy<void*, ConstMemory>;
  e->sync_memcpy_htod = Copy<Memory, const void*>;
  e->sync_memcpy_dtod = Copy<Memory, ConstMemory>;
  e->block_host_for_event = Succeed<SP_Event>;
  e->block_host_until_done = Succeed<SP_Stream>;
  e->synchronize_all_activity = Succeed<>;
  e->mem_zero = [](Device device, SP_Stream stream, Memory to, uint64_t bytes,
                   TF_Status* status) {
    Fill<uint8_t>(device, stream, to, 0, bytes, status);
  };
  e->memset = Fill<uint8_t>;
  e->memset32 = Fill<uint32_t>;
  e->host_callback = [](Device, SP_Stream, SE_StatusCallbackFn function,
                        void* argument) -> TF_Bool {
    TF_Status* const status = TF_NewStatus();
    function(argument, status);
    const bool ok = TF_GetCode(status) == TF_OK;
    TF_DeleteStatus(status);
    return ok;
  };
}

void FillPlatform(SP_PlatformFns* p) {
  p->struct_size = SP_PLATFORM_FNS_STRUCT_SIZE;
  p->get_device_count = [](Platform, int* count, TF_Status* status) {
    *count = 1;
    TF_SetStatus(status, TF_OK, "");
  };
  p->create_device = [](Platform, SE_CreateDeviceParams* params,
                        TF_Status* status) {
    params->device->struct_size = SP_DEVICE_STRUCT_SIZE;
    params->device->ordinal = params->ordinal;
    TF_SetStatus(status, TF_OK, "");
  };
  p->destroy_device = [](Platform, SP_Device*) {};
  p->create_device_fns = [](Platform, SE_CreateDeviceFnsParams* params,
                            TF_Status* status) {
    SP_DeviceFns* const f = params->device_fns;
    f->struct_size = SP_DEVICE_FNS_STRUCT_SIZE;
    f->get_numa_node = [](Device) -> int32_t { return -1; };
    f->get_memory_bandwidth = [](Device) -> int64_t { return -1; };
    f->get_gflops = [](Device) { return -1.0; };
    TF_SetStatus(status, TF_OK, "");
  };
  p->destroy_device_fns = [](Platform, SP_DeviceFns*) {};
  p->create_stream_executor =
      [](Platform, SE_CreateStreamExecutorParams* params, TF_Status* status) {
        FillExecutor(params->stream_executor);
        TF_SetStatus(status, TF_OK, "");
      };
  p->destroy_stream_executor = [](Platform, SP_StreamExecutor*) {};
  p->create_timer_fns = [](Platform, SP_TimerFns* timer, TF_Status* status) {
    timer->struct_size = SP_TIMER_FNS_STRUCT_SIZE;
    timer->nanoseconds = [](SP_Timer) -> uint64_t { return 0; };
    TF_SetStatus(status, TF_OK, "");
  };
  p->destroy_timer_fns = [](Platform, SP_TimerFns*) {};
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void SE_InitPlugin(
    SE_PlatformRegistrationParams* params, TF_Status* status) {
  params->major_version = SE_MAJOR;
  params->minor_version = SE_MINOR;
  params->patch_version = SE_PATCH;
  params->platform->struct_size = SP_PLATFORM_STRUCT_SIZE;
  params->platform->name = "EMULATED";
  params->platform->type = "GPU";
  FillPlatform(params->platform_fns);
  params->destroy_platform = [](SP_Platform*) {};
  params->destroy_platform_fns = [](SP_PlatformFns*) {};
  TF_SetStatus(status, TF_OK, "");
}

__attribute__((visibility("default"))) void TF_InitKernel() {}

}  // extern "C"

// -----------------------------------------------------------------------------
// XLA has no compiler for such a device. But calls for "CUDA" can also be
// made on the host, by another name, if they are given a stream.

namespace {

// Tests look for this address in the recorded launches.
void* const kStream = reinterpret_cast<void*>(0x57eea0);

XLA_FFI_Error* GetStream(XLA_FFI_Stream_Get_Args* arguments) {
  arguments->stream = kStream;
  return nullptr;
}

constexpr int kOps = 6;
constexpr const char* kNames[kOps] = {
    "TfDeform>DeformableConv2D",    "TfDeform>DeformableConv2DGrad",
    "TfDeform>DeformablePSROIPool", "TfDeform>DeformablePSROIPoolGrad",
    "TfDeform>DeformableROIAlign",  "TfDeform>DeformableROIAlignGrad"};
XLA_FFI_Handler* on_cuda[kOps];

template <int kOp>
XLA_FFI_Error* RunOnHost(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Api api = *frame->api;
  api.XLA_FFI_Stream_Get = GetStream;
  XLA_FFI_CallFrame with_stream = *frame;
  with_stream.api = &api;
  return on_cuda[kOp](&with_stream);
}

// Registers the ops from kOp on; returns whether all are registered.
template <int kOp = 0>
bool Register() {
  if constexpr (kOp < kOps) {
    const auto found = xla::ffi::FindHandler(kNames[kOp], "CUDA");
    if (!found.ok()) return false;
    on_cuda[kOp] = found->bundle.execute;
    const std::string name = std::string("CUDA:") + kNames[kOp];
    XLA_FFI_Handler_Register_Args arguments = {};
    arguments.struct_size = XLA_FFI_Handler_Register_Args_STRUCT_SIZE;
    arguments.name = {name.data(), name.size()};
    arguments.platform = {"Host", 4};
    arguments.bundle.execute = RunOnHost<kOp>;
    if (xla::ffi::GetXlaFfiApi()->XLA_FFI_Handler_Register(&arguments)) {
      return false;
    }
    return Register<kOp + 1>();
  }
  return true;
}

}  // namespace

// Lets XLA call functions that are registered for "CUDA" as "CUDA:TfDeform>..."
// on the host, and returns the stream that they get; null if an op is not
// registered.
extern "C" __attribute__((visibility("default"))) void*
TfDeformEmulateXlaOnCuda() {
  return Register() ? kStream : nullptr;
}
