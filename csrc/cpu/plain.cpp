#define SMART_ISA plain
#define SMART_NAME "plain"
#define SMART_WIDTH 4
#define SMART_MAX_TILE 8
#include "cpu/kernels.h"
