// Hopper's instructions, as the body in wgmma_body.h calls them: PTX ISA, chapters on mbarrier, on bulk copies, and on
// asynchronous warpgroup-level matrix instructions. Only sm_90a has them.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "wgmma.h"

namespace smart::cuda {

#define SMART_SUMS(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
#define SMART_WGMMA_SP(type)                                                                                         \
  asm volatile(                                                                                                      \
      "wgmma.mma_async.sp.sync.aligned.m64n128k32.f32." type "." type                                                \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "       \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "    \
      "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "   \
      "{%64, %65, %66, %67}, %68, %69, 0, 1, 1, 1, 0;"                                                               \
      : SMART_SUMS(0), SMART_SUMS(1), SMART_SUMS(2), SMART_SUMS(3), SMART_SUMS(4), SMART_SUMS(5), SMART_SUMS(6),     \
        SMART_SUMS(7), SMART_SUMS(8), SMART_SUMS(9), SMART_SUMS(10), SMART_SUMS(11), SMART_SUMS(12), SMART_SUMS(13), \
        SMART_SUMS(14), SMART_SUMS(15)                                                                               \
      : "r"(weights.word[0]), "r"(weights.word[1]), "r"(weights.word[2]), "r"(weights.word[3]), "l"(pixels),         \
        "r"(metadata))

template <int kMultipliers>
struct Hopper {
  using Map = CUtensorMap;

  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int block() const { return blockIdx.x; }
  __device__ __forceinline__ int split() const { return blockIdx.y; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }

  // What all threads of a warp have alike: the compiler keeps products together only where it knows that.
  __device__ __forceinline__ int uniform(int number) const { return __shfl_sync(0xffffffffu, number, 0); }

  // Barrier 0 is __syncthreads.
  __device__ __forceinline__ void sync_multipliers() const {
    asm volatile("bar.sync 1, %0;" ::"n"(kMultipliers) : "memory");
  }

  __device__ __forceinline__ void sync_group(int group) const {
    // A number that the compiler does not know takes all 16 barriers: too many for two thread blocks beside each other.
    if constexpr (kMultipliers == kGroupThreads)
      asm volatile("bar.sync 2, %0;" ::"n"(kGroupThreads) : "memory");
    else
      asm volatile("bar.sync %0, %1;" ::"r"(2 + group), "n"(kGroupThreads) : "memory");
  }

  __device__ __forceinline__ uint32_t shared_address(const void* pointer) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  }

  __device__ __forceinline__ void start_barrier(uint64_t* barrier, int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  }

  // To the units that copy.
  __device__ __forceinline__ void show_barriers() const {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  __device__ __forceinline__ void arrive(uint64_t* barrier) const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
  }

  // Arrives, and adds bytes to those that copies have to bring in this phase.
  __device__ __forceinline__ void expect_bytes(uint64_t* barrier, int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
  }

  // Waits until the phase of this parity is over; that before the first counts as one of parity 1.
  __device__ __forceinline__ void wait_barrier(uint64_t* barrier, int parity) const {
    uint32_t done;
    do {
      asm volatile(
          "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    } while (!done);
  }

  // Sizes and addresses are multiples of 16.
  __device__ __forceinline__ void copy_bytes(char* to, const void* from, int bytes, uint64_t* barrier) const {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
  }

  // Copies channels of kTilePixels pixels, from the one at (column, row) of an image on, of each the tap beside it.
  __device__ __forceinline__ void copy_pixels(char* to, const Map& map, int channel, int column, int row, int image,
                                              int tap_column, int tap_row, uint64_t* barrier) const {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2], {%7, %8};" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(channel), "r"(column), "r"(row), "r"(image),
        "h"(static_cast<uint16_t>(tap_column)), "h"(static_cast<uint16_t>(tap_row))
        : "memory");
  }

  __device__ __forceinline__ void store(char* to, const Words& words) const {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(words.word[0]),
                 "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3])
                 : "memory");
  }

  // To tensor cores, what this thread stored.
  __device__ __forceinline__ void show_stores() const { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  // Before products, whose registers were written since the last ones.
  __device__ __forceinline__ void begin_products() const { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  __device__ __forceinline__ void end_products() const {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void wait_products() const {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }

  // A use of a register that costs nothing: until here it holds what it holds.
  __device__ __forceinline__ void keep(uint32_t& word) const { asm volatile("" : "+r"(word)::"memory"); }

  // Starts sums (64 x 128) += weights (64 x 32, two kept of each four) * pixels (32 x 128).
  template <class Element>
  __device__ __forceinline__ void multiply(float (&sums)[kTiles][4], const Words& weights, uint32_t metadata,
                                           uint64_t pixels) const {
    if constexpr (std::is_same_v<Element, Half>) {
      SMART_WGMMA_SP("f16");
    } else {
      SMART_WGMMA_SP("bf16");
    }
  }
};

#undef SMART_WGMMA_SP
#undef SMART_SUMS

}  // namespace smart::cuda
