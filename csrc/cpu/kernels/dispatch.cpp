// Chooses the kernel table once, when the first kernel runs.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace nms {
namespace {

struct Level {
  const char* isa;
  Kernels table;
};

const std::vector<Level>& levels() {  // slowest first; only those that this host can run
  static const std::vector<Level> all = [] {
    std::vector<Level> found{{"scalar", scalar_kernels()}};
    found.back().table.linear = scalar_linear();
    found.back().table.conv = scalar_conv();
    found.back().table.optim = scalar_optim();
    found.back().table.int8 = scalar_int8();
    found.back().table.matmul = scalar_matmul();
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
                      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2) {
      found.push_back({"avx2", avx2_kernels()});
      found.back().table.linear = scalar_linear();
      found.back().table.conv = scalar_conv();
      use_avx2_linear(found.back().table.linear);
      use_avx2_conv(found.back().table.conv);
      found.back().table.optim = avx2_optim();
      found.back().table.int8 = scalar_int8();
      use_avx2_int8(found.back().table.int8);
      found.back().table.matmul = scalar_matmul();
      use_avx2_matmul(found.back().table.matmul);
    }
    if (avx512) {
      found.push_back({"avx512", avx512_kernels()});
      found.back().table.linear = scalar_linear();
      found.back().table.conv = scalar_conv();
      use_avx512_linear(found.back().table.linear);
      use_avx512_conv(found.back().table.conv);
      found.back().table.optim = avx512_optim();
      if (__builtin_cpu_supports("avx512bf16")) {
        use_avx512_bf16_linear(found.back().table.linear);
        use_avx512_bf16_conv(found.back().table.conv);
      }
      found.back().table.matmul = scalar_matmul();
      use_avx512_matmul(found.back().table.matmul);
      if (__builtin_cpu_supports("avx512bf16")) use_avx512_bf16_matmul(found.back().table.matmul);
      found.back().table.int8 = scalar_int8();
      use_avx2_int8(found.back().table.int8);
      if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
        use_vnni_int8(found.back().table.int8);
      found.back().table.pack_panels = &pack_panels_avx512;
      found.back().table.unpack_panels = &unpack_panels_avx512;
    }
#endif
    return found;
  }();
  return all;
}

const Level* find_level(const char* isa) {
  for (const Level& level : levels())
    if (std::strcmp(level.isa, isa) == 0) return &level;
  return nullptr;
}

// A wish that this host cannot fulfil, or does not know, is answered with the best it has.
const Kernels* initial_table() {
  const char* wish = std::getenv("NMSPARSE_CPU_ISA");
  if (!wish) {
    wish = std::getenv("ATEN_CPU_CAPABILITY");  // the switch of torch's own kernels; "default" is its scalar level
    if (wish && std::strcmp(wish, "default") == 0) wish = "scalar";
  }
  const Level* level = wish ? find_level(wish) : nullptr;
  return level ? &level->table : &levels().back().table;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{initial_table()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_acquire); }

const char* cpu_isa() { return kernels().isa; }

std::vector<const char*> cpu_isas() {
  std::vector<const char*> names;
  for (const Level& level : levels()) names.push_back(level.isa);
  return names;
}

bool set_cpu_isa(const char* isa) {
  const Level* level = find_level(isa);
  if (level) current().store(&level->table, std::memory_order_release);
  return level != nullptr;
}

}  // namespace nms
