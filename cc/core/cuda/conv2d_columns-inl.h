// SPDX-License-Identifier: Apache-2.0
// Samples columns of a deformable convolution into a GPU's shared memory, and
// multiplies them there.
//
// The columns (see deformable_conv2d.cu) exist only as panels in shared
// memory: a row for each of some pixels, with kInner or more channels of one
// tap. A block goes through its steps, each a panel of columns and one of the
// other operand, like this, with one barrier a step:
//
//   step s      mix the corners in registers to a panel of columns
//               locate the samples of step s + 1, if they are new
//   barrier
//               load corners of step s + 1 to registers  } under way during
//               copy the other operand of step s + 2     } the product
//               multiply the panels of step s

#ifndef TF_DEFORM_CC_CORE_CUDA_CONV2D_COLUMNS_INL_H_
#define TF_DEFORM_CC_CORE_CUDA_CONV2D_COLUMNS_INL_H_

#include "cc/core/cuda/conv2d_sampling-inl.h"
#include "cc/core/cuda/matrix-inl.h"

namespace tf_deform {
namespace cuda {

// The operands, and whether rows of channels or of filters come in whole packs
// of 16 bytes. `gradient` is the gradient of the inputs, or null.
template <typename T>
struct Operands {
  const T* inputs;
  const T* kernel;
  const Accumulator<T>* offset;
  const Accumulator<T>* mask;  // null: all ones
  bool packed_channels, packed_filters;

  Operands(const Geometry& g, const DeformableConv2DInputs& from,
           const void* grad_output, const void* gradient)
      : inputs(static_cast<const T*>(from.inputs)),
        kernel(static_cast<const T*>(from.kernel)),
        offset(static_cast<const Accumulator<T>*>(from.offset)),
        mask(g.most > 0 ? offset + 2 * g.fields
                        : static_cast<const Accumulator<T>*>(from.mask)),
        packed_channels(IsAligned(inputs, 16) && IsAligned(gradient, 16) &&
                        g.group_channels % kPack<T> == 0 &&
                        g.offset_channels % kPack<T> == 0),
        packed_filters(IsAligned(kernel, 16) && IsAligned(grad_output, 16) &&
                       g.group_filters % kPack<T> == 0) {}
};

// Returns mask * sample of one channel.
template <typename T>
__device__ __forceinline__ Accumulator<T> ColumnAt(
    const Geometry& g, const Operands<T>& in, const Sample<Accumulator<T>>& s,
    int64_t channel) {
  const Corners<Accumulator<T>> corners(g, s);
  Accumulator<T> sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if ((s.flags >> i & 1) == 0) continue;
    sum += corners.weights[i] *
           Widen(in.inputs[s.corner + corners.steps[i] + channel]);
  }
  return s.mask * sum;
}

// Reads packs of a sample's channels; each thread has a reader.
template <typename T>
struct PackReader {
  static constexpr int kWords = 4;

  const T* corner;  // the channel of the top left corner that is read next
  uint32_t flags;
  float weights[4], mask;
  Pack<uint32_t, kWords> at[4];  // the corners' pack, 0 outside the image

  // `channel` is the thread's first channel.
  __device__ __forceinline__ void Locate(const Geometry& g,
                                         const Operands<T>& in,
                                         const Sample<float>& s, int channel) {
    const Corners<float> corners(g, s);
    corner = in.inputs + s.corner + channel;
    flags = s.flags;
    mask = s.mask;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i] = corners.weights[i];
      at[i] = {};
    }
  }

  // Reads a pack, if `exists`, and moves on by kInner channels.
  __device__ __forceinline__ void Load(const Geometry& g, bool exists) {
    const uint32_t wanted = exists ? flags : 0;
    const int64_t steps[4] = {0, g.channels, g.row, g.row + g.channels};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((wanted >> i & 1) != 0) {
        at[i] =
            *reinterpret_cast<const Pack<uint32_t, kWords>*>(corner + steps[i]);
      }
    }
    corner += kInner<T>;
  }

  // Returns mask * sample, 0 if not `exists`; as tf32 if kTf32.
  template <bool kTf32>
  __device__ __forceinline__ Pack<uint32_t, kWords> Mix(bool exists) const {
    Pack<uint32_t, kWords> mixed = {};
    if (!exists) return mixed;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float sums[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < Word<T>::kCount; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[j] += weights[i] * Word<T>::At(at[i].values[w], j);
        }
        sums[j] *= mask;
      }
      mixed.values[w] = Word<T>::Of(sums[0], sums[1]);
      if constexpr (kTf32) {
        mixed.values[w] = FloatToTf32(BitsToFloat(mixed.values[w]));
      }
    }
    return mixed;
  }
};

// Copies a panel from a matrix in global memory in the background (if not
// `packed`, in the foreground), zeros past `rows` and `columns`, with kBlock
// threads. Elements of the panel are counted in 32 bits (see IsDirect).
template <typename Shape, int kBlock, typename T>
__device__ __forceinline__ void CopyPanel(const T* from, int row_stride,
                                          int rows, int columns, bool packed,
                                          T* to) {
  static_assert(kBlock % Shape::kPacks == 0, "a thread keeps its column");
  constexpr int kRows = kBlock / Shape::kPacks;  // at once
  const int row = static_cast<int>(threadIdx.x) / Shape::kPacks;
  const int column = static_cast<int>(threadIdx.x) % Shape::kPacks * kPack<T>;
  const T* source = from + (row * row_stride + column);
  T* target = to + (row * Shape::kStride + column);
  if (packed) {
#pragma unroll
    for (int i = 0; i < Shape::kRows; i += kRows) {
      if (Shape::kRows % kRows != 0 && row + i >= Shape::kRows) break;
      CopyAsync(target + i * Shape::kStride, source + i * row_stride,
                row + i < rows && column < columns);
    }
    return;
  }
#pragma unroll 1
  for (int i = row; i < Shape::kRows; i += kRows) {
#pragma unroll 1
    for (int j = 0; j < kPack<T>; ++j) {
      target[j] = i < rows && column + j < columns ? source[j] : T{};
    }
    source += kRows * row_stride;
    target += kRows * Shape::kStride;
  }
}

// Shared memory of MultiplyColumns.
template <typename T, typename Sums, int kPlan>
struct ColumnBuffers {
  // Packs of a panel that a thread samples.
  static constexpr int kLoads =
      Sums::A::kRows * Sums::A::kPacks / Sums::kThreads;
  static_assert(Sums::A::kRows * Sums::A::kPacks % Sums::kThreads == 0,
                "all threads sample");
  static_assert(kPlan <= Sums::kThreads, "a thread locates one sample");

  alignas(16) T a[2][Sums::A::kElements];
  alignas(16) T b[3][Sums::B::kElements];
  Sample<float> plans[2][kPlan];
};

// Adds the columns times the other operand to the sums, over all steps of `at`,
// a cursor with
//   bool Done() const            there is no step here, nor any after it
//   void Next()                  goes to the next step
//   static constexpr int kPlan   samples that are located together, the plan
//   Pixel<float> PixelOf(int i) const, int tap, field    sample i of the plan
//   bool IsNewPlan() const       the step before had other samples
//   int PlanRow() const          the first sample that belongs to this step
//   static constexpr bool kKeepsRows    PlanRow() is constant within a plan
//   int channel, count           the panel's channels; kInner further on if
//                                neither samples nor rows are new
//   void CopyOther(T* to) const  copies the other operand's panel
// There is at least one step.
template <typename T, typename Sums, typename Cursor>
__device__ __forceinline__ void MultiplyColumns(
    const Geometry& g, const Operands<T>& in, Cursor at,
    ColumnBuffers<T, Sums, Cursor::kPlan>* shared, Sums* sums) {
  using Shape = typename Sums::A;
  constexpr int kBlock = Sums::kThreads;
  constexpr int kLoads = ColumnBuffers<T, Sums, Cursor::kPlan>::kLoads;
  const int thread = threadIdx.x;
  const bool plans = thread < Cursor::kPlan;

  const auto read = [&](const Cursor& step) {
    return Displacement<float>::Read(g, step.PixelOf(thread), step.field,
                                     in.offset, in.mask);
  };
  const auto locate = [&](const Cursor& step, const Displacement<float>& d) {
    return Sample<float>::template Locate<uint32_t>(g, step.PixelOf(thread),
                                                    step.tap, d);
  };
  PackReader<T> readers[kLoads];
  const auto load = [&](const Cursor& step, const Sample<float>* plan,
                        bool is_new) {
    if (!in.packed_channels) return;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int pack = thread + i * kBlock;
      const int first = pack % Shape::kPacks * kPack<T>;
      if (is_new || !Cursor::kKeepsRows) {
        readers[i].Locate(g, in, plan[step.PlanRow() + pack / Shape::kPacks],
                          step.channel + first);
      }
      readers[i].Load(g, first < step.count);
    }
  };
  const auto mix = [&](const Cursor& step, const Sample<float>* plan, T* to) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int pack = thread + i * kBlock;
      const int row = pack / Shape::kPacks;
      const int first = pack % Shape::kPacks * kPack<T>;
      T* const target = to + row * Shape::kStride + first;
      if (in.packed_channels) {
        *reinterpret_cast<Pack<uint32_t, 4>*>(target) =
            readers[i].template Mix<Sums::kIsTf32>(first < step.count);
        continue;
      }
      // Channels that do not come in packs are read when they are used.
#pragma unroll 1
      for (int j = 0; j < kPack<T>; ++j) {
        float value = 0;
        if (first + j < step.count) {
          value = ColumnAt(g, in, plan[step.PlanRow() + row],
                           step.channel + first + j);
        }
        if constexpr (Sums::kIsTf32) value = BitsToFloat(FloatToTf32(value));
        Narrow(value, target + j);
      }
    }
  };

  Cursor next = at;
  next.Next();
  Cursor after = next;
  after.Next();
  if (plans) shared->plans[0][thread] = locate(at, read(at));
  at.CopyOther(shared->b[0]);
  CommitCopies();
  Displacement<float> pending = {};
  if (!next.Done()) {
    next.CopyOther(shared->b[1]);
    if (plans && next.IsNewPlan()) pending = read(next);
  }
  CommitCopies();
  __syncthreads();
  load(at, shared->plans[0], true);

  int plan = 0, stage = 0;  // of step `at`
  for (int parity = 0; !at.Done(); parity ^= 1) {
    T* const a = shared->a[parity];
    mix(at, shared->plans[plan], a);
    const bool is_new = !next.Done() && next.IsNewPlan();
    if (is_new && plans) {
      shared->plans[plan ^ 1][thread] = locate(next, pending);
    }
    WaitCopies<1>();
    __syncthreads();
    if (is_new) plan ^= 1;
    if (!next.Done()) load(next, shared->plans[plan], is_new);
    if (!after.Done()) {
      after.CopyOther(shared->b[stage == 0 ? 2 : stage - 1]);
      if (plans && after.IsNewPlan()) pending = read(after);
    }
    CommitCopies();
    sums->Step(a, shared->b[stage]);
    stage = stage == 2 ? 0 : stage + 1;
    at = next;
    next = after;
    if (!after.Done()) after.Next();
  }
}

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CUDA_CONV2D_COLUMNS_INL_H_
