#define SMART_ISA avx512
#define SMART_NAME "avx512"
#define SMART_WIDTH 16
#define SMART_MAX_TILE 16
#include "cpu/kernels.h"
