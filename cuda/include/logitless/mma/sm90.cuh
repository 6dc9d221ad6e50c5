// sm90.cuh - how an operand tile lies in shared memory, and the descriptor that tells wgmma so.
//
// Both majors use the 128-byte swizzle and panels of 64 (MN) x 64 (K) halves = 8192 bytes:
//   K-major   a row of the panel is 64 k of one m; the next 8 rows follow at 1024 bytes; k16
//             advances 32 bytes inside the row
//   MN-major  a row of the panel is 64 m of one k; the next 8 k follow at 1024 bytes (SBO), the
//             next 64 m at 8192 (LBO); k16 advances 2048 bytes
#pragma once
#include "logitless/mma/wgmma.cuh"
#include "logitless/ptx/wgmma.cuh"

namespace logitless {

enum Major { kMajorK = 0, kMajorMN = 1 };

constexpr int kDepth = 64;             // K of one stage: one 128-byte row of halves
constexpr int kPanelBytes = 64 * 128;  // 64 rows of 128 bytes

template <int kMajor>
struct Operand {
  static constexpr u32 kStep =
      (kMajor == kMajorMN ? 2048 : 32) >> 4;           // descriptor units of one k16
  static constexpr u32 kNextPanel = kPanelBytes >> 4;  // and of the next 64 rows of MN

  static __device__ __forceinline__ u64 descriptor(u32 address) {
    constexpr u64 kSwizzle128 = 1ull << 62;
    constexpr u64 kStride = static_cast<u64>(1024 >> 4) << 32;
    constexpr u64 kLeading = static_cast<u64>(kMajor == kMajorMN ? kPanelBytes >> 4 : 1) << 16;
    return kSwizzle128 | kStride | kLeading | ((address & 0x3ffff) >> 4);
  }
};

}  // namespace logitless
