#define SMART_ISA plain
#define SMART_NAME "plain"
#define SMART_WIDTH 4
#include "cpu/kernels.h"
