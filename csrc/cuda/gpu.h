// Instructions that CUDA C++ has no words for, as kernel bodies call them. PTX ISA, chapters on warp-level matrix
// instructions and on asynchronous copies.
#pragma once

#include <type_traits>

#include "portable.h"

namespace smart::cuda {

// Ordered metadata (two positions of a group ascend) came with CUDA 12.5, and are the only kind that Hopper runs at
// full speed.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define SMART_MMA_SP "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32"
#else
#define SMART_MMA_SP "mma.sp.sync.aligned.m16n8k32.row.col.f32"
#endif

struct Gpu {
  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int block() const { return blockIdx.x; }
  __device__ __forceinline__ int split() const { return blockIdx.y; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }

  // Starts to copy 16 bytes into shared memory, zeros if they are not `inside`; the source is not read then.
  __device__ __forceinline__ void copy16(char* to, const void* from, bool inside) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
  }

  // Closes a group of copies; there may be none in it.
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }

  // Waits until at most `kPending` of this thread's last groups are under way.
  template <int kPending>
  __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }

  // Four matrices of 8 x 8: each lane points at a row of one, and gets two neighbours of row lane / 4 of each.
  __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const char* row) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }

  // What the lane so far below has; below lane 0, the lane's own.
  __device__ __forceinline__ uint32_t shuffle_up(uint32_t value, int distance) const {
    return __shfl_up_sync(0xffffffffu, value, distance);
  }

  // sums (16 x 8) += weights (16 x 16) * columns (16 x 8).
  template <class Element>
  __device__ __forceinline__ void multiply(float (&sums)[4], const Words& weights, const uint32_t (&columns)[2]) const {
#define SMART_MULTIPLY(type)                                                                             \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                    \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                              \
               : "r"(weights.word[0]), "r"(weights.word[1]), "r"(weights.word[2]), "r"(weights.word[3]), \
                 "r"(columns[0]), "r"(columns[1]))
    if constexpr (std::is_same_v<Element, Half>) {
      SMART_MULTIPLY("f16");
    } else {
      SMART_MULTIPLY("bf16");
    }
#undef SMART_MULTIPLY
  }

  // sums (16 x 8) += weights (16 x 32, two kept of each four) * columns (32 x 8).
  template <class Element, int kSelector>
  __device__ __forceinline__ void multiply(float (&sums)[4], const Words& weights, const uint32_t (&columns)[4],
                                           uint32_t metadata) const {
#define SMART_MULTIPLY(type)                                                                                       \
  asm volatile(SMART_MMA_SP "." type "." type                                                                      \
                            ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, " \
                            "%13;"                                                                                 \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                        \
               : "r"(weights.word[0]), "r"(weights.word[1]), "r"(weights.word[2]), "r"(weights.word[3]),           \
                 "r"(columns[0]), "r"(columns[1]), "r"(columns[2]), "r"(columns[3]), "r"(metadata), "n"(kSelector))
    if constexpr (std::is_same_v<Element, Half>) {
      SMART_MULTIPLY("f16");
    } else {
      SMART_MULTIPLY("bf16");
    }
#undef SMART_MULTIPLY
  }

 private:
  static __device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  }
};

}  // namespace smart::cuda
