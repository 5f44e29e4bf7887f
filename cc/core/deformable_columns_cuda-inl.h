// Columns of a deformable convolution on a GPU: sampled into shared memory, and
// multiplied there. SPDX-License-Identifier: Apache-2.0
//
// The columns (see deformable_conv2d_cuda.cu) exist only as panels in shared
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

#ifndef TF_DEFORM_CC_CORE_DEFORMABLE_COLUMNS_CUDA_INL_H_
#define TF_DEFORM_CC_CORE_DEFORMABLE_COLUMNS_CUDA_INL_H_

#include "cc/core/deformable_sampling_cuda-inl.h"
#include "cc/core/matrix_cuda-inl.h"

namespace tf_deform {
namespace cuda {

// The operands, and whether rows of channels (in `gradient` too, that of the
// inputs, if it is not null) or filters come in whole packs of 16 bytes.
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
        mask(static_cast<const Accumulator<T>*>(from.mask)),
        packed_channels(IsAligned(inputs, 16) && IsAligned(gradient, 16) &&
                        g.group_channels % kPack<T> == 0 &&
                        g.offset_channels % kPack<T> == 0),
        packed_filters(IsAligned(kernel, 16) && IsAligned(grad_output, 16) &&
                       g.group_filters % kPack<T> == 0) {}
};

// mask * sample of one channel.
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

// The four corners of a sample in a pack of channels.
template <typename T>
struct CornerPacks {
  Pack<T, kPack<T>> at[4];

  // Zeros for corners outside the image, and for all if not `exists`.
  __device__ __forceinline__ void Load(const Geometry& g, const Operands<T>& in,
                                       const Sample<Accumulator<T>>& s,
                                       int channel, bool exists) {
    const Corners<Accumulator<T>> corners(g, s);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      at[i] = {};
      if (exists && (s.flags >> i & 1) != 0) {
        at[i] = *reinterpret_cast<const Pack<T, kPack<T>>*>(
            in.inputs + s.corner + corners.steps[i] + channel);
      }
    }
  }

  // mask * sample, 0 if not `exists`.
  __device__ __forceinline__ Pack<T, kPack<T>> Mix(
      const Geometry& g, const Sample<Accumulator<T>>& s, bool exists) const {
    const Corners<Accumulator<T>> corners(g, s);
    Pack<T, kPack<T>> mixed = {};
    if (!exists) return mixed;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      Accumulator<T> sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum += corners.weights[i] * Widen(at[i].values[j]);
      }
      Narrow(s.mask * sum, &mixed.values[j]);
    }
    return mixed;
  }
};

// Copies a panel from a matrix in global memory in the background (if not
// `packed`, in the foreground), zeros past `rows` and `columns`, with kBlock
// threads.
template <typename Shape, int kBlock, typename T>
__device__ __forceinline__ void CopyPanel(const T* from, int64_t row_stride,
                                          int64_t rows, int64_t columns,
                                          bool packed, T* to) {
#pragma unroll
  for (int first = 0; first < Shape::kRows * Shape::kPacks; first += kBlock) {
    const int i = first + static_cast<int>(threadIdx.x);
    if (i >= Shape::kRows * Shape::kPacks) break;
    const int row = i / Shape::kPacks;
    const int column = i % Shape::kPacks * kPack<T>;
    const T* source = from + row * row_stride + column;
    T* target = to + row * Shape::kStride + column;
    if (packed) {
      CopyAsync(target, source, row < rows && column < columns);
    } else {
#pragma unroll 1
      for (int j = 0; j < kPack<T>; ++j) {
        target[j] = row < rows && column + j < columns ? source[j] : T{};
      }
    }
  }
}

// Shared memory of MultiplyColumns.
template <typename T, typename Sums>
struct ColumnBuffers {
  alignas(16) T a[2][Sums::A::kElements];
  alignas(16) T b[3][Sums::B::kElements];
  Sample<Accumulator<T>> plans[2][Sums::A::kRows];
};

// sums += the columns times the other operand, over all steps of `at`, a cursor
// with
//   bool Done() const            no step here, nor any after it
//   void Next()                  to the next step
//   bool IsNewPlan() const       its samples are not those of the step before
//   Pixel<E> PixelOf(int row) const, int tap, field    its samples
//   int channel, count           the panel's channels
//   void CopyOther(T* to) const  copies the other operand's panel
// There is at least one step.
template <typename T, typename Sums, typename Cursor>
__device__ __forceinline__ void MultiplyColumns(const Geometry& g,
                                                const Operands<T>& in,
                                                Cursor at,
                                                ColumnBuffers<T, Sums>* shared,
                                                Sums* sums) {
  using E = Accumulator<T>;
  using Shape = typename Sums::A;
  constexpr int kBlock = Sums::kThreads;
  constexpr int kLoads = Shape::kRows * Shape::kPacks / kBlock;
  static_assert(Shape::kRows * Shape::kPacks % kBlock == 0,
                "all threads sample");
  static_assert(Shape::kRows <= kBlock, "a thread locates one sample");
  const int thread = threadIdx.x;
  const bool plans = thread < Shape::kRows;

  const auto read = [&](const Cursor& step) {
    return Displacement<E>::Read(step.PixelOf(thread), step.field, in.offset,
                                 in.mask);
  };
  const auto locate = [&](const Cursor& step, const Displacement<E>& d) {
    return Sample<E>::template Locate<uint32_t>(g, step.PixelOf(thread),
                                                step.tap, d);
  };
  CornerPacks<T> corners[kLoads];
  const auto load = [&](const Cursor& step, const Sample<E>* plan) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int pack = thread + i * kBlock;
      const int first = pack % Shape::kPacks * kPack<T>;
      corners[i].Load(g, in, plan[pack / Shape::kPacks], step.channel + first,
                      in.packed_channels && first < step.count);
    }
  };

  const auto mix = [&](const Cursor& step, const Sample<E>* plan, T* to) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int pack = thread + i * kBlock;
      const int row = pack / Shape::kPacks;
      const int first = pack % Shape::kPacks * kPack<T>;
      T* const target = to + row * Shape::kStride + first;
      if (in.packed_channels) {
        *reinterpret_cast<Pack<T, kPack<T>>*>(target) =
            corners[i].Mix(g, plan[row], first < step.count);
        continue;
      }
      // Channels that do not come in packs are read when they are wanted.
#pragma unroll 1
      for (int j = 0; j < kPack<T>; ++j) {
        E value = 0;
        if (first + j < step.count) {
          value = ColumnAt(g, in, plan[row], step.channel + first + j);
        }
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
  Displacement<E> pending = {};
  if (!next.Done()) {
    next.CopyOther(shared->b[1]);
    if (plans && next.IsNewPlan()) pending = read(next);
  }
  CommitCopies();
  __syncthreads();
  load(at, shared->plans[0]);

  int plan = 0, stage = 0;  // of step `at`
  for (int parity = 0; !at.Done(); parity ^= 1) {
    T* const a = shared->a[parity];
    mix(at, shared->plans[plan], a);
    const bool is_new = !next.Done() && next.IsNewPlan();
    if (is_new && plans)
      shared->plans[plan ^ 1][thread] = locate(next, pending);
    WaitCopies<1>();
    __syncthreads();
    if (is_new) plan ^= 1;
    if (!next.Done()) load(next, shared->plans[plan]);
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

#endif  // TF_DEFORM_CC_CORE_DEFORMABLE_COLUMNS_CUDA_INL_H_
