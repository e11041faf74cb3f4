// Which instruction sets this library holds, and which of them the machine has.
#pragma once

#include "cpu/problem.h"

namespace smart::cpu {

// The kernels named "avx512", "avx2" or "plain"; "" for the fastest the machine runs. With " winograd" or " direct"
// behind its name, they run convolutions in that way wherever they can. Null if the machine cannot run them.
const Kernels* find_kernels(const char* name);

}  // namespace smart::cpu
