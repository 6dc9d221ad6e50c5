// direct.cuh - stores of a warp's fragment straight from registers (mma.sync path): the same face
// as PanelStore.
//
// A quad writes 16 contiguous bytes of a row at a time (32 for floats); the L2 joins them. That is
// 3% of the sectors that the product itself loads, so staging in shared memory would buy nothing
// here. A column pair is written whole where its first column exists: the pitch is a multiple of 16
// bytes and its padding belongs to the buffer.
#pragma once
#include "logitless/epilogue/band.cuh"
#include "logitless/ptx/half.cuh"

namespace logitless {

template <class Element>
struct DirectStore {
  using Half = Element;
  const GemmParams& p;
  int rows, lane, row = 0, column = 0;
  i64 shift = 0;  // elements from D to the result of this slice of K

  __device__ __forceinline__ DirectStore(const GemmParams& p, int rows, int lane)
      : p(p), rows(rows), lane(lane) {}

  __device__ __forceinline__ void open(int first_column) { column = first_column; }

  // Two neighbouring columns of one of the lane's two rows.
  __device__ __forceinline__ void write(int half, int offset, float a, float b) {
    const int r = row + (lane >> 2) + 8 * half, c = column + offset + 2 * (lane & 3);
    if (r >= rows || c >= p.n) return;
    const i64 at = shift + r * p.ldd + c;
    if constexpr (Element::kBytes == 2) static_cast<u32*>(p.d)[at / 2] = Element::pack(a, b);
    else *reinterpret_cast<float2*>(static_cast<float*>(p.d) + at) = make_float2(a, b);
  }
  __device__ __forceinline__ void put(int q, const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) write((i >> 1) & 1, 16 * q + 8 * (i >> 2), v[i], v[i + 1]);
  }
  // Each element of D belongs to one thread: adding is a plain read and write.
  __device__ __forceinline__ void put_float(int j, const float (&v)[4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row + (lane >> 2) + 8 * half, c = column + 8 * j + 2 * (lane & 3);
      if (r >= rows || c >= p.n) continue;
      float2* at = reinterpret_cast<float2*>(static_cast<float*>(p.d) + shift + r * p.ldd + c);
      float2 x = make_float2(v[2 * half], v[2 * half + 1]);
      if (p.accumulate) {
        const float2 old = *at;
        x.x += old.x;
        x.y += old.y;
      }
      *at = x;
    }
  }
  template <bool kAdd>
  __device__ __forceinline__ void close() {}
};

}  // namespace logitless
