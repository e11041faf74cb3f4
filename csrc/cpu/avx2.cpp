#define SMART_ISA avx2
#define SMART_NAME "avx2"
#define SMART_WIDTH 8
#define SMART_MAX_TILE 8
#include "cpu/kernels.h"
