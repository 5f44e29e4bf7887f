// SPDX-License-Identifier: Apache-2.0
// Defines the entry points of an op on the CPU: they judge the call, then run
// the code for this processor.

#ifndef TF_DEFORM_CC_CORE_CPU_ENTRY_POINTS_H_
#define TF_DEFORM_CC_CORE_CPU_ENTRY_POINTS_H_

// Defines what the contract of `Op` declares in namespace cpu. An op's cpu/*.cc
// includes every_isa-inl.h before; the arguments after `Op` name the output
// that Forward has besides `output`, if there is one.
#define TF_DEFORM_CPU_ENTRY_POINTS(Op, ...)                                  \
  int64_t WorkspaceBytes(const Op::Params& params, DataType type,            \
                         int num_workers) {                                  \
    return TF_DEFORM_BEST(WorkspaceBytes)(params, type, num_workers);        \
  }                                                                          \
                                                                             \
  int64_t BackwardWorkspaceBytes(const Op::Params& params, DataType type,    \
                                 const Op::Gradients& wanted,                \
                                 int num_workers) {                          \
    return TF_DEFORM_BEST(BackwardWorkspaceBytes)(params, type, wanted,      \
                                                  num_workers);              \
  }                                                                          \
                                                                             \
  Status Forward(const Op::Params& params, DataType type,                    \
                 const Op::Inputs& operands, void* workspace, void* output,  \
                 __VA_OPT__(float* __VA_ARGS__, )                            \
                     const ParallelFor& parallel_for) {                      \
    TF_DEFORM_RETURN_IF_ERROR(CheckOperands(params, type, operands));        \
    TF_DEFORM_BEST(Forward)(params, type, operands, workspace, output,       \
                            __VA_OPT__(__VA_ARGS__, ) parallel_for);         \
    return Status();                                                         \
  }                                                                          \
                                                                             \
  Status Backward(const Op::Params& params, DataType type,                   \
                  const Op::Inputs& operands, const void* grad_output,       \
                  void* workspace, const Op::Gradients& gradients,           \
                  const ParallelFor& parallel_for) {                         \
    TF_DEFORM_RETURN_IF_ERROR(CheckOperands(params, type, operands));        \
    TF_DEFORM_BEST(Backward)(params, type, operands, grad_output, workspace, \
                             gradients, parallel_for);                       \
    return Status();                                                         \
  }

#endif  // TF_DEFORM_CC_CORE_CPU_ENTRY_POINTS_H_
