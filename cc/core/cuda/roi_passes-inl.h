// SPDX-License-Identifier: Apache-2.0
// Computes forward and the gradients of both pooling operators on a GPU.
//
//   PoolPass        A block pools some bins, of one ROI or of several. When
//                   their weights are found, the threads of a bin each sum up a
//                   few channels, 16 bytes at a time where all is aligned, one
//                   element otherwise.
//   DisplacePass    The gradient of a displacement is the same sum with the
//                   derivative of the weights along one axis. A few lanes of a
//                   warp own a displacement: they walk through its bins and sum
//                   in an order that is always the same.
//   ScatterPass     Divided as PoolPass, but pixels are added to, by atomics,
//                   instead of read. Sums of 16-bit types are made in a float32
//                   image and narrowed at the end. If it has to be
//                   deterministic, a block owns a tile of pixels of the
//                   gradient and a thread a channel, and walks through all bins
//                   in order, as a task of the CPU does.

#ifndef TF_DEFORM_CC_CORE_CUDA_ROI_PASSES_INL_H_
#define TF_DEFORM_CC_CORE_CUDA_ROI_PASSES_INL_H_

#include "cc/core/cuda/roi_packing-inl.h"

namespace tf_deform {
namespace cuda {

// Writes output and, if not null, count. kN: channels of a thread.
template <int kN, typename T, typename Rule, typename E>
__global__ void __launch_bounds__(kThreads, kBlocks)
    PoolKernel(Rule rule, Maps maps, Blocking blocking,
               const T* __restrict__ inputs, const E* __restrict__ rois,
               const E* __restrict__ displacements, T* __restrict__ output,
               float* __restrict__ count) {
  const Worker<E> worker(rule, maps, rois, displacements, blocking, kN);
  const Bin<E>& bin = *worker.bin;
  E sum[kN] = {};
  worker.planner.template ForEachWindow<false>(rule, [&] {
    if (worker.count <= 0) return;
    const T* from = inputs + bin.map + worker.channel * maps.channel;
    const int rows = bin.y.count, columns = bin.x.count;
    for (int a = 0; a < rows; ++a) {
      const T* row = from + bin.y.at[a] * rule.width * maps.pixel;
      E in_row[kN] = {};
#pragma unroll 4
      for (int b = 0; b < columns; ++b) {
        E values[kN];
        LoadWide<kN>(row + bin.x.at[b] * maps.pixel, values);
#pragma unroll
        for (int i = 0; i < kN; ++i) in_row[i] += bin.x.weight[b] * values[i];
      }
#pragma unroll
      for (int i = 0; i < kN; ++i) sum[i] += bin.y.weight[a] * in_row[i];
    }
  });
  if (worker.count <= 0 || bin.output < 0) return;
  const E share = bin.share;
  const int64_t to = bin.output + worker.channel;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    if (i >= worker.count) break;
    Narrow(sum[i] * share, output + to + i);
    if (count != nullptr) {
      count[to + i] = static_cast<float>(bin.samples);
    }
  }
}

// Adds to the gradient of the inputs, kept in `sums`, by atomic operations.
template <int kN, typename T, typename Rule, typename E>
__global__ void __launch_bounds__(kThreads, kBlocks)
    ScatterKernel(Rule rule, Maps maps, Blocking blocking,
                  const E* __restrict__ rois,
                  const E* __restrict__ displacements,
                  const T* __restrict__ grad_output, E* __restrict__ sums) {
  const Worker<E> worker(rule, maps, rois, displacements, blocking, kN);
  const Bin<E>& bin = *worker.bin;
  worker.planner.template ForEachWindow<false>(rule, [&] {
    if (worker.count <= 0 || bin.IsEmpty()) return;
    const E share = bin.share;
    E gradient[kN];
    LoadSome<kN>(grad_output + bin.output + worker.channel, worker.count,
                 gradient);
    E* to = sums + worker.channel * maps.channel;
    ForEachPixel(maps, rule.width, bin, [&](int64_t at, int a, int b) {
      const E weight = bin.y.weight[a] * bin.x.weight[b] * share;
      E values[kN];
#pragma unroll
      for (int i = 0; i < kN; ++i) values[i] = weight * gradient[i];
      if constexpr (kN == 4) {
        AddAtomically(to + at, values);
      } else {
#pragma unroll
        for (int i = 0; i < kN; ++i) AddAtomically(to + at + i, values[i]);
      }
    });
  });
}

// Returns the first bin of `pooled` that belongs to part `index` of `parts`, or
// to a part behind it.
__device__ __forceinline__ int64_t FirstBin(int64_t index, int64_t pooled,
                                            const Divider& parts) {
  return (index * pooled + parts.value - 1) / parts;
}

// Writes the gradients of displacements that are not 0; all are 0 before.
// `lanes` threads, a power of two up to 32, own a displacement, and a block has
// `owned` of these.
template <int kN, typename T, typename Rule, typename E>
__global__ void __launch_bounds__(kThreads, kBlocks)
    DisplaceKernel(Rule rule, Maps maps, int owned, int lanes,
                   const T* __restrict__ inputs, const E* __restrict__ rois,
                   const E* __restrict__ displacements,
                   const T* __restrict__ grad_output,
                   E* __restrict__ grad_displacements) {
  Bin<E>* bins = reinterpret_cast<Bin<E>*>(SharedMemory());
  const Planner<E> planner(rule, bins, owned);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * owned;
  const int mine = static_cast<int>(threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const Bin<E>& bin = bins[Min(mine, owned - 1)];
  E sum_y = 0, sum_x = 0;
  const auto add = [&] {
    if (mine >= owned || bin.IsEmpty()) return;
    E along_y = 0, along_x = 0;
    for (int64_t c = int64_t{lane} * kN; c < rule.class_channels;
         c += int64_t{lanes} * kN) {
      E gradient[kN];
      LoadSome<kN>(grad_output + bin.output + c, rule.class_channels - c,
                   gradient);
      const T* from = inputs + c * maps.channel;
      ForEachPixel(maps, rule.width, bin, [&](int64_t at, int a, int b) {
        E values[kN];
        LoadWide<kN>(from + at, values);
        E dot = 0;
#pragma unroll
        for (int i = 0; i < kN; ++i) dot += values[i] * gradient[i];
        along_y += bin.y.slope[a] * bin.x.weight[b] * dot;
        along_x += bin.y.weight[a] * bin.x.slope[b] * dot;
      });
    }
    sum_y += along_y * bin.share * bin.y.reach;
    sum_x += along_x * bin.share * bin.x.reach;
  };
  const int64_t index = first + threadIdx.x / 2;  // displacement it plans for
  const int64_t part = index / rule.classes, part_row = part / rule.part_w;
  const int64_t part_x = part % rule.part_w, part_y = part_row % rule.part_h;
  const int64_t r = part_row / rule.part_h;
  // A displacement has at most `rows` by `columns` bins.
  const int64_t rows = FirstBin(1, rule.pooled_h, rule.part_h);
  const int64_t columns = FirstBin(1, rule.pooled_w, rule.part_w);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t ph = FirstBin(part_y, rule.pooled_h, rule.part_h) + row;
      const int64_t pw = FirstBin(part_x, rule.pooled_w, rule.part_w) + column;
      const bool exists =
          r < rule.num_rois &&
          ph < FirstBin(part_y + 1, rule.pooled_h, rule.part_h) &&
          pw < FirstBin(part_x + 1, rule.pooled_w, rule.part_w);
      planner.Plan(rule, maps, rois, displacements, exists, r, ph, pw,
                   index % rule.classes);
      planner.template ForEachWindow<true>(rule, add);
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    sum_y += __shfl_xor_sync(0xffffffffu, sum_y, step);
    sum_x += __shfl_xor_sync(0xffffffffu, sum_x, step);
  }
  if (lane != 0 || (sum_y == 0 && sum_x == 0)) return;
  grad_displacements[2 * (first + mine)] = sum_y;
  grad_displacements[2 * (first + mine) + 1] = sum_x;
}

// A tile of pixels of one image and cell. A block owns a tile, a thread a
// channel of it.
constexpr int kTileRows = 4, kTileColumns = 8;

struct Tiles {
  Divider rows, columns;  // of an image
  Divider slices;         // of the channels of a cell
};

// Writes the gradient of the inputs, with sums in an order that is always the
// same.
template <typename T, typename Rule, typename E>
__global__ void __launch_bounds__(kThreads, kBlocks)
    OwnedScatterKernel(Rule rule, Tiles tiles, const E* __restrict__ rois,
                       const E* __restrict__ displacements,
                       const T* __restrict__ grad_output,
                       T* __restrict__ grad_inputs) {
  const int threads = static_cast<int>(blockDim.x);
  const int64_t depth = rule.Depth(), cells = rule.Cells();
  int64_t rest = blockIdx.x;
  const int64_t slice = rest % tiles.slices;
  rest = rest / tiles.slices;
  const int64_t gw = rest % rule.group_w;
  rest = rest / rule.group_w;
  const int64_t gh = rest % rule.group_h;
  rest = rest / rule.group_h;
  const int left = static_cast<int>(rest % tiles.columns) * kTileColumns;
  rest = rest / tiles.columns;
  const int above = static_cast<int>(rest % tiles.rows) * kTileRows;
  const int64_t image = rest / tiles.rows;
  const int64_t channel = slice * threads + threadIdx.x;

  // The bins and classes that add to the tile.
  const int64_t ph_end = FirstBin(gh + 1, rule.pooled_h, rule.group_h);
  const int64_t pw_end = FirstBin(gw + 1, rule.pooled_w, rule.group_w);
  const int64_t k_begin = slice * threads / rule.class_channels;
  const int64_t k_end =
      (Min(depth, (slice + 1) * threads) - 1) / rule.class_channels + 1;

  Bin<E>* bins = reinterpret_cast<Bin<E>*>(SharedMemory());
  E* sums = reinterpret_cast<E*>(bins + kMaxBins) + threadIdx.x;
  for (int i = 0; i < kTileRows * kTileColumns; ++i) sums[i * threads] = 0;
  Planner<E> planner(rule, bins, kMaxBins);
  planner.span.low = planner.along_x ? left : above;
  planner.span.high =
      planner.span.low + (planner.along_x ? kTileColumns : kTileRows);
  // Maps of this image in which a bin's place is its first channel.
  const Maps maps = {image, 1, 0, 0, 0, 1};
  const auto add = [&] {
    for (int i = 0; i < kMaxBins; ++i) {
      const Bin<E>& bin = bins[i];
      const int64_t c = channel - bin.map;
      if (bin.IsEmpty() || c < 0 || c >= rule.class_channels) continue;
      const E gradient = Widen(grad_output[bin.output + c]) * bin.share;
      for (int a = 0; a < bin.y.count; ++a) {
        E* row = sums + (bin.y.at[a] - above) * kTileColumns * threads;
        for (int b = 0; b < bin.x.count; ++b) {
          row[(bin.x.at[b] - left) * threads] +=
              bin.y.weight[a] * bin.x.weight[b] * gradient;
        }
      }
    }
  };
  for (int64_t ph = FirstBin(gh, rule.pooled_h, rule.group_h); ph < ph_end;
       ++ph) {
    for (int64_t pw = FirstBin(gw, rule.pooled_w, rule.group_w); pw < pw_end;
         ++pw) {
      for (int64_t k = k_begin; k < k_end; ++k) {
        for (int64_t first = 0; first < rule.num_rois; first += kMaxBins) {
          const int64_t r = first + threadIdx.x / 2;
          planner.Plan(rule, maps, rois, displacements, r < rule.num_rois, r,
                       ph, pw, k);
          planner.template ForEachWindow<false>(rule, add);
        }
      }
    }
  }
  if (channel >= depth) return;
  for (int i = 0; i < kTileRows * kTileColumns; ++i) {
    const int64_t row = above + i / kTileColumns;
    const int64_t column = left + i % kTileColumns;
    if (row >= rule.height || column >= rule.width) continue;
    Narrow(sums[i * threads],
           grad_inputs +
               (((image * rule.height + row) * rule.width + column) * depth +
                channel) *
                   cells +
               gh * rule.group_w + gw);
  }
}

// Writes sums as elements of T.
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    NarrowKernel(int64_t count, const float* __restrict__ from,
                 T* __restrict__ to) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPackThreads;
  for (int64_t i =
           static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
       i < count; i += step) {
    Narrow(from[i], to + i);
  }
}

// -----------------------------------------------------------------------------
// On the host.

// Bytes for PoolPass and DisplacePass.
template <typename T>
int64_t PoolWorkspace(const RoiGeometry& g) {
  return PackedBytes<T>(g);
}

// Writes output and, if not null, count.
template <typename T, typename Rule, typename E>
Status PoolPass(const Rule& rule, const T* inputs, const E* rois,
                const E* displacements, void* workspace, T* output,
                float* count, const CudaStream& stream) {
  return ForEachPackedChunk(
      rule, inputs, workspace, stream,
      [&](auto lanes, const Maps& maps, const T* from) {
        constexpr int kN = decltype(lanes)::value;
        const Blocking blocking(CeilDiv(rule.class_channels, kN));
        return Launch("PoolKernel", PoolKernel<kN, T, Rule, E>,
                      blocking.Blocks(rule), blocking.threads,
                      blocking.bins * sizeof(Bin<E>), stream, rule, maps,
                      blocking, from, rois, displacements, output, count);
      });
}

// Writes the gradient of the displacements.
template <typename T, typename Rule, typename E>
Status DisplacePass(const Rule& rule, const T* inputs, const E* rois,
                    const E* displacements, const T* grad_output,
                    void* workspace, E* grad_displacements,
                    const CudaStream& stream) {
  const int64_t total =
      rule.num_rois * rule.part_h * rule.part_w * rule.classes;
  TF_DEFORM_RETURN_IF_ERROR(
      Clear(grad_displacements, 2 * total * sizeof(E), stream));
  return ForEachPackedChunk(
      rule, inputs, workspace, stream,
      [&](auto lanes, const Maps& maps, const T* from) {
        constexpr int kN = decltype(lanes)::value;
        int each = 1;
        while (each < 32 && each * kN < rule.class_channels) each *= 2;
        const int owned = static_cast<int>(Min(kMaxBins, kThreads / each));
        const int threads = static_cast<int>(RoundUp(Max(2, each) * owned, 32));
        return Launch("DisplaceKernel", DisplaceKernel<kN, T, Rule, E>,
                      CeilDiv(total, owned), threads, owned * sizeof(Bin<E>),
                      stream, rule, maps, owned, each, from, rois,
                      displacements, grad_output, grad_displacements);
      });
}

// Returns whether the gradient of the inputs is summed in the workspace: if its
// type is narrow or it is repacked, unless its pixels have owners.
template <typename T>
bool HasSums(const Packing& packing) {
  return sizeof(T) < sizeof(Accumulator<T>) || packing.depth > 0;
}

// Bytes for ScatterPass: sums.
template <typename T>
int64_t ScatterWorkspace(const RoiGeometry& g, const CudaStream& stream) {
  const Packing packing(g, sizeof(Accumulator<T>));
  if (stream.deterministic || !HasSums<T>(packing)) return 0;
  return packing.step * packing.image * sizeof(Accumulator<T>);
}

// Writes the gradient of the inputs.
template <typename T, typename Rule, typename E>
Status ScatterPass(const Rule& rule, const E* rois, const E* displacements,
                   const T* grad_output, void* workspace, T* grad_inputs,
                   const CudaStream& stream) {
  if (rule.Image() == 0) return Status();
  const int64_t bytes = sizeof(E);
  if (stream.deterministic) {
    const int threads = static_cast<int>(
        Min(kThreads, Max(2 * kMaxBins, RoundUp(rule.Depth(), 32))));
    const Tiles tiles = {CeilDiv(rule.height, kTileRows),
                         CeilDiv(rule.width, kTileColumns),
                         CeilDiv(rule.Depth(), threads)};
    return Launch(
        "OwnedScatterKernel", OwnedScatterKernel<T, Rule, E>,
        rule.batch * tiles.rows * tiles.columns * rule.Cells() * tiles.slices,
        threads,
        kMaxBins * sizeof(Bin<E>) + threads * kTileRows * kTileColumns * bytes,
        stream, rule, tiles, rois, displacements, grad_output, grad_inputs);
  }
  const Packing packing(rule, bytes);
  const bool has_sums = HasSums<T>(packing);
  const int64_t step = has_sums ? packing.step : Max(1, rule.batch);
  for (int64_t first = 0; first < rule.batch; first += step) {
    const int64_t images = Min(step, rule.batch - first);
    const int64_t elements = images * packing.image;
    const Maps maps = packing.MapsFrom(rule, first, images);
    T* const target = grad_inputs + first * rule.Image();
    E* sums = static_cast<E*>(workspace);
    if constexpr (sizeof(T) == sizeof(E)) {
      if (!has_sums) sums = target;
    }
    TF_DEFORM_RETURN_IF_ERROR(Clear(sums, elements * bytes, stream));
    TF_DEFORM_RETURN_IF_ERROR(WithLanes(rule, maps, sums, [&](auto lanes) {
      constexpr int kN = decltype(lanes)::value;
      const Blocking blocking(CeilDiv(rule.class_channels, kN));
      return Launch("ScatterKernel", ScatterKernel<kN, T, Rule, E>,
                    blocking.Blocks(rule), blocking.threads,
                    blocking.bins * sizeof(Bin<E>), stream, rule, maps,
                    blocking, rois, displacements, grad_output, sums);
    }));
    if (packing.depth > 0) {
      TF_DEFORM_RETURN_IF_ERROR(
          Launch("PackKernel", PackKernel<true, E, T>, images * packing.tiles,
                 kPackThreads, packing.shared_bytes, stream, RoiGeometry(rule),
                 packing, static_cast<const E*>(sums), target));
    } else if constexpr (sizeof(T) < sizeof(E)) {
      TF_DEFORM_RETURN_IF_ERROR(
          Launch("NarrowKernel", NarrowKernel<T>,
                 Min(CeilDiv(elements, kPackThreads), 8 * Multiprocessors()),
                 kPackThreads, 0, stream, elements, static_cast<const E*>(sums),
                 target));
    }
  }
  return Status();
}

// -----------------------------------------------------------------------------
// The functions of an op's contract. The operands of the op are inputs, ROIs
// and displacements; `Rule` places its samples.

template <typename Op>
constexpr auto kDisplacements = Op::kOperands[2];

// Calls body(T(), the rule of the call).
template <template <typename> class Rule, typename Params, typename Body>
Status WithRule(const Params& params, DataType type, const Body& body) {
  return WithType(type, [&](auto zero) {
    return body(zero, Rule<Accumulator<decltype(zero)>>(params));
  });
}

template <typename Op, template <typename> class Rule>
int64_t OpWorkspaceBytes(const typename Op::Params& params, DataType type) {
  int64_t bytes = 0;
  (void)WithRule<Rule>(params, type, [&](auto zero, const auto& rule) {
    bytes = PoolWorkspace<decltype(zero)>(rule);
    return Status();
  });
  return bytes;
}

// The passes run one after the other in the same workspace.
template <typename Op, template <typename> class Rule>
int64_t OpBackwardWorkspaceBytes(const typename Op::Params& params,
                                 DataType type,
                                 const typename Op::Gradients& wanted,
                                 const CudaStream& stream) {
  int64_t bytes = 0;
  (void)WithRule<Rule>(params, type, [&](auto zero, const auto& rule) {
    using T = decltype(zero);
    if (wanted.inputs != nullptr) bytes = ScatterWorkspace<T>(rule, stream);
    if (wanted.*kDisplacements<Op>.gradient != nullptr) {
      bytes = Max(bytes, PoolWorkspace<T>(rule));
    }
    return Status();
  });
  return bytes;
}

// Checks the driver and the call.
template <typename Op>
Status CheckLaunch(const typename Op::Params& params, DataType type,
                   typename Op::Inputs operands) {
  TF_DEFORM_RETURN_IF_ERROR(CheckDriver());
  operands.bad_rois_are_padding = true;  // the host cannot read the ROIs
  return CheckOperands(params, type, operands);
}

template <typename Op, template <typename> class Rule>
Status OpForward(const typename Op::Params& params, DataType type,
                 const typename Op::Inputs& operands, void* workspace,
                 void* output, const CudaStream& stream,
                 float* count = nullptr) {
  TF_DEFORM_RETURN_IF_ERROR(CheckLaunch<Op>(params, type, operands));
  return WithRule<Rule>(params, type, [&](auto zero, const auto& rule) {
    using T = decltype(zero);
    using E = Accumulator<T>;
    return PoolPass(rule, static_cast<const T*>(operands.inputs),
                    static_cast<const E*>(operands.rois),
                    static_cast<const E*>(operands.*kDisplacements<Op>.data),
                    workspace, static_cast<T*>(output), count, stream);
  });
}

template <typename Op, template <typename> class Rule>
Status OpBackward(const typename Op::Params& params, DataType type,
                  const typename Op::Inputs& operands, const void* grad_output,
                  void* workspace, const typename Op::Gradients& gradients,
                  const CudaStream& stream) {
  TF_DEFORM_RETURN_IF_ERROR(CheckLaunch<Op>(params, type, operands));
  return WithRule<Rule>(params, type, [&](auto zero, const auto& rule) {
    using T = decltype(zero);
    using E = Accumulator<T>;
    constexpr auto displacements = kDisplacements<Op>;
    const E* rois = static_cast<const E*>(operands.rois);
    const E* from = static_cast<const E*>(operands.*displacements.data);
    E* to = static_cast<E*>(gradients.*displacements.gradient);
    const T* gradient = static_cast<const T*>(grad_output);
    if (gradients.inputs != nullptr) {
      TF_DEFORM_RETURN_IF_ERROR(
          ScatterPass(rule, rois, from, gradient, workspace,
                      static_cast<T*>(gradients.inputs), stream));
    }
    if (to == nullptr) return Status();
    return DisplacePass(rule, static_cast<const T*>(operands.inputs), rois,
                        from, gradient, workspace, to, stream);
  });
}

}  // namespace cuda
}  // namespace tf_deform

// Defines the functions that the contract of `Op` declares in namespace cuda.
// The argument after `Rule` names the output that Forward has besides `output`,
// if there is one.
#define TF_DEFORM_CUDA_ENTRY_POINTS(Op, Rule, ...)                            \
  int64_t WorkspaceBytes(const Op::Params& params, DataType type) {           \
    return OpWorkspaceBytes<Op, Rule>(params, type);                          \
  }                                                                           \
                                                                              \
  int64_t BackwardWorkspaceBytes(const Op::Params& params, DataType type,     \
                                 const Op::Gradients& wanted,                 \
                                 const CudaStream& stream) {                  \
    return OpBackwardWorkspaceBytes<Op, Rule>(params, type, wanted, stream);  \
  }                                                                           \
                                                                              \
  Status Forward(const Op::Params& params, DataType type,                     \
                 const Op::Inputs& operands, void* workspace, void* output,   \
                 __VA_OPT__(float* __VA_ARGS__, ) const CudaStream& stream) { \
    return OpForward<Op, Rule>(params, type, operands, workspace, output,     \
                               stream __VA_OPT__(, ) __VA_ARGS__);            \
  }                                                                           \
                                                                              \
  Status Backward(const Op::Params& params, DataType type,                    \
                  const Op::Inputs& operands, const void* grad_output,        \
                  void* workspace, const Op::Gradients& gradients,            \
                  const CudaStream& stream) {                                 \
    return OpBackward<Op, Rule>(params, type, operands, grad_output,          \
                                workspace, gradients, stream);                \
  }

#endif  // TF_DEFORM_CC_CORE_CUDA_ROI_PASSES_INL_H_
