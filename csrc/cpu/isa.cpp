#include "cpu/isa.h"

#include <string>
#include <utility>
#include <vector>

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

// The kernels that a name means; "NAME winograd" and "NAME direct" are those of NAME that run convolutions in one way.
struct Named {
  std::string name;
  Kernels kernels;
};

std::vector<Named> all_ways(const Candidate* candidates, int count) {
  std::vector<Named> ways;
  for (int i = 0; i < count; ++i) {
    if (!candidates[i].runs) continue;
    for (const auto& [suffix, choice] :
         {std::pair{"", Choice::kAuto}, {" winograd", Choice::kAlways}, {" direct", Choice::kNever}}) {
      ways.push_back({candidates[i].kernels->name + std::string(suffix), *candidates[i].kernels});
      ways.back().kernels.winograd = choice;
    }
  }
  return ways;
}

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
  static const std::vector<Named> ways = [] {
    int count = 0;
    const Candidate* candidates = fastest_first(count);
    return all_ways(candidates, count);
  }();
  for (const Named& way : ways)
    if (*name == '\0' || way.name == name) return &way.kernels;
  return nullptr;
}

}  // namespace smart::cpu
