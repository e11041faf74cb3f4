#define SMART_ISA avx512
#define SMART_NAME "avx512"
#define SMART_WIDTH 16
#include "cpu/kernels.h"
