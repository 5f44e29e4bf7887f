// SPDX-License-Identifier: Apache-2.0
// Defines the description of an op, from which templates make all glue.
//
// Every contract has a struct that describes its op once:
//
//   struct X : OpTypes<XParams, XShapes, XInputs, XGradients> {
//     static constexpr char kName[] = "X";
//     enum : int { kInputs, kOffset };
//     static constexpr Operand kOperands[] = {
//         {"inputs", kValue, kRequired, &Shapes::inputs, &Inputs::inputs,
//          &Gradients::inputs},
//         {"offset", kCoordinate, kOptional, &Shapes::offset, &Inputs::offset,
//          &Gradients::offset}};
//     static std::array<Dimension, 4> OutputShape(const Params& params);
//   };
//
// Operands have the order in which every caller passes them. At most one
// operand is optional, and it comes last.

#ifndef TF_DEFORM_CC_CORE_OP_H_
#define TF_DEFORM_CC_CORE_OP_H_

#include <array>
#include <cstdint>

#include "cc/core/common.h"

namespace tf_deform {

// kValue: elements of the type T, which is float16, bfloat16, float32 or
// float64. kCoordinate: float32, or float64 if T is float64.
enum OperandKind { kValue, kCoordinate };

enum OperandPresence { kRequired, kOptional };

// Describes one operand: its name, and its fields in the structs of the
// contract.
template <typename Shapes, typename Inputs, typename Gradients>
struct OperandOf {
  const char* name;
  OperandKind kind;
  OperandPresence presence;
  const Shape* Shapes::* shape;
  const void* Inputs::* data;
  void* Gradients::* gradient;  // null: the operand has no gradient
};

// Describes one dimension of the output: its size, or -1 if the size is not
// known, and the axis of an operand that has the same size; no operand (-1) if
// an attribute is the size.
struct Dimension {
  int64_t size;
  int operand = -1, axis = -1;
};

// Defines the types of an op, and defaults for ops that do not override them.
template <typename ParamsOf, typename ShapesOf, typename InputsOf,
          typename GradientsOf>
struct OpTypes {
  using Params = ParamsOf;
  using Shapes = ShapesOf;
  using Inputs = InputsOf;
  using Gradients = GradientsOf;
  using Operand = OperandOf<Shapes, Inputs, Gradients>;

  // Names further outputs, which are float and have the output's shape.
  static constexpr std::array<const char*, 0> kExtraOutputs = {};
  // Points to the field that a caller sets if it cannot check the values of
  // ROIs; null: the op has no ROIs.
  static constexpr bool Inputs::* kBadRoisArePadding = nullptr;
  // Points to the field for memory of PackedBytes (BackwardPackedBytes) bytes
  // that a caller may keep from call to call; null: the op has no use for it.
  static constexpr void* Inputs::* kPacked = nullptr;
};

// Counts the operands that every call of an op has: all, or all but the last.
template <typename Op>
constexpr int NumRequired() {
  int number = 0;
  for (const auto& operand : Op::kOperands) {
    if (operand.presence == kOptional) break;
    ++number;
  }
  return number;
}

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_OP_H_
