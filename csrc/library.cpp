// Every operation of torch.ops.nmsparse. What each does is documented by its twin in nmsparse_ext/reference.py.
#include "torch_utils.h"

STABLE_TORCH_LIBRARY(nmsparse, m) {
  m.def("prune(Tensor w, int n, int m, int dim, bool pad) -> (Tensor, Tensor)");
  m.def("prune_out(Tensor w, int n, int m, int dim, bool pad, Tensor(a!) out, Tensor(b!)? bits) -> ()");
  m.def("prune_(Tensor(a!) w, int n, int m, int dim, bool pad, Tensor(b!)? bits) -> ()");
  m.def("mask_bits(Tensor w, int n, int m, int dim, bool pad) -> Tensor");
  m.def("pack_bits(Tensor mask, int dim) -> Tensor");
  m.def("unpack_bits(Tensor bits, SymInt k, int dim) -> Tensor");
  m.def("apply_bits(Tensor w, Tensor bits, int dim) -> Tensor");
  m.def("apply_bits_(Tensor(a!) w, Tensor bits, int dim) -> ()");
  m.def("add_pruned_(Tensor(a!) grad, Tensor w, Tensor bits, int dim, float alpha, Tensor? scale) -> ()");
  m.def("sad(Tensor a, Tensor b) -> Tensor");
  m.def("sad_out(Tensor a, Tensor b, Tensor(a!) out) -> ()");
  m.def("find_violation(Tensor w, int n, int m, int dim, bool pad) -> Tensor");
  m.def("compress(Tensor w, int n, int m, int dim, bool pad) -> (Tensor, Tensor)");
  m.def("decompress(Tensor values, Tensor indices, int n, int m, SymInt k, int dim) -> Tensor");
  m.def("check_indices(Tensor indices, int n, int m, SymInt k) -> Tensor");
  m.def("transposable_bits(Tensor w) -> Tensor");
  m.def(
      "sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] sparse, Tensor(d!)[] bits, "
      "Tensor(e!)[] changes, int[] patterns, str term, float lambda_w, float lr, Tensor? lr_tensor, float momentum, "
      "float dampening, float weight_decay, bool nesterov, bool maximize, bool first, Tensor? grad_scale, "
      "Tensor? found_inf) -> ()");
  m.def(
      "adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, Tensor[] steps, Tensor(e!)[] sparse, Tensor(f!)[] bits, Tensor(g!)[] changes, "
      "int[] patterns, str term, float lambda_w, float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, "
      "float weight_decay, bool amsgrad, bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def(
      "foreach_add_pruned(Tensor[] grads, Tensor[] ws, Tensor[] bits, int[] dims, float[] alphas, Tensor? scale, "
      "Tensor(a!)[] outs) -> ()");
  m.def("foreach_apply_bits(Tensor[] ws, Tensor[] bits, int[] dims, Tensor(a!)[] outs) -> ()");
  m.def(
      "foreach_reselect(Tensor[] ws, int[] ns, int[] ms, int[] dims, Tensor(a!)[] outs, Tensor(b!)[] bits, "
      "Tensor(c!) changes, int[] places, Tensor(d!)? work) -> ()");
  m.def(
      "foreach_add_kept(Tensor[] grads, Tensor[] ws, Tensor[] bits, int[] dims, float[] alphas, Tensor? scale, "
      "Tensor(a!)[] outs) -> ()");
  m.def("foreach_vote(Tensor[] ws, Tensor[] thresholds, int[] ns, int[] ms, int[] dims, Tensor(a!) counts) -> ()");
  m.def("group_thresholds(Tensor w, int m, int dim) -> Tensor");
  m.def("panel_pack(Tensor values, Tensor indices, int n, int m, SymInt k) -> (Tensor, Tensor)");
  m.def(
      "panel_restore(Tensor value_panels, Tensor index_panels, int n, int m, SymInt rows, SymInt k) -> (Tensor, "
      "Tensor)");
  m.def("panel_unpack(Tensor value_panels, Tensor index_panels, int n, int m, SymInt rows, SymInt k) -> Tensor");
  m.def(
      "panel_linear(Tensor x, Tensor value_panels, Tensor index_panels, Tensor? bias, int n, int m, SymInt rows, "
      "SymInt k, str activation) -> Tensor");
  m.def(
      "panel_matmul(Tensor x, Tensor value_panels, Tensor index_panels, int n, int m, SymInt rows, SymInt k) -> "
      "Tensor");
  m.def(
      "panel_conv(Tensor x, Tensor value_panels, Tensor index_panels, Tensor? bias, Tensor? residual, int n, int m, "
      "SymInt rows, SymInt k, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, str activation) "
      "-> Tensor");
  m.def(
      "panel_linear_int8(Tensor x, Tensor value_panels, Tensor index_panels, Tensor scales, Tensor sums, Tensor? bias, "
      "int n, int m, SymInt rows, SymInt k, str activation) -> Tensor");
  m.def("lt_pack(Tensor values, Tensor indices, SymInt k, str layout) -> Tensor");
  m.def("lt_compress(Tensor w, SymInt size) -> Tensor");
  m.def(
      "lt_matmul(Tensor x, Tensor blob, Tensor? bias, Tensor? scales, float alpha, SymInt rows, str activation, "
      "ScalarType? out_dtype, int algorithm, int split_k, int split_k_mode) -> Tensor");
  m.def(
      "small_batch_linear(Tensor x, Tensor values, Tensor indices, Tensor? scales, Tensor? bias, int n, int m, SymInt "
      "k, "
      "str activation) -> Tensor");
  m.def("epilogue(Tensor y, Tensor? scales, Tensor? bias, str activation) -> Tensor");
  m.def("epilogue_(Tensor(a!) y, Tensor? scales, Tensor? bias, str activation) -> ()");
  m.def("lt_prune_pack(Tensor w, str layout) -> Tensor");
  m.def("transposable_pack(Tensor w) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
