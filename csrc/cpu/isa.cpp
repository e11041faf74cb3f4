#include "cpu/isa.h"

#include <cstring>

namespace smart::cpu {

namespace plain {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

const Candidate* fastest_first(int& count) {
#if defined(__x86_64__)
  static const Candidate candidates[] = {
      {&avx512::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&plain::kernels, true},
  };
#else
  static const Candidate candidates[] = {{&plain::kernels, true}};
#endif
  count = sizeof(candidates) / sizeof(candidates[0]);
  return candidates;
}

}  // namespace

const Kernels* find_kernels(const char* name) {
  int count = 0;
  const Candidate* candidates = fastest_first(count);
  for (int i = 0; i < count; ++i) {
    const bool asked = *name == '\0' || std::strcmp(name, candidates[i].kernels->name) == 0;
    if (asked && candidates[i].runs) return candidates[i].kernels;
  }
  return nullptr;
}

}  // namespace smart::cpu
