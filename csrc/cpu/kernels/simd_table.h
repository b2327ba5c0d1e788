// The scalar table with every entry replaced for which there is something faster.
//
// Note    Included inside a target region, last.
#pragma once

template <DType D>
void use_simd(Kernels& table) {
  table.select[static_cast<int>(D)] = select<D>;
  table.compress[static_cast<int>(D)] = compress<D>;
}

inline Kernels simd_table(const char* isa) {
  Kernels table = scalar_kernels();
  table.isa = isa;
  use_simd<DType::kFloat32>(table);
  use_simd<DType::kBFloat16>(table);
  use_simd<DType::kFloat16>(table);
  use_simd<DType::kInt8>(table);
  use_simd<DType::kFloat8E4M3>(table);
  table.apply_bits[0] = apply_bits<1>;
  table.apply_bits[1] = apply_bits<2>;
  table.apply_bits[2] = apply_bits<4>;
  table.add_pruned = add_row<PrunedSum>;
  table.add_kept = add_row<KeptSum>;
  table.count_differing = count_differing;
  table.vote[1] = count_votes;
  return table;
}
