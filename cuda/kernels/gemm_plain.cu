// gemm_plain.cu - D[M, N] = A[M, K] B[N, K]^T without tensor cores, for any strides and for double.
//
// Block tile 64 x 64 x 16, 256 threads of 4 x 4 outputs; each output is one chain of fused multiply-adds in k order, so the
// result does not depend on the grid. The way of last resort: double, and float where no tensor-core image fits.
#include "logitless/common.cuh"

using namespace logitless;

namespace {

template <class T, class Out>
__device__ __forceinline__ void plain(const PlainParams& p) {
  using Acc = typename Element<T>::Acc;
  constexpr int kTile = 64, kStep = 16, kPad = 4;
  __shared__ Acc a_tile[kStep][kTile + kPad], b_tile[kStep][kTile + kPad];
  const int live = p.count ? *p.count : 0x7fffffff;
  if (live < 0) return;
  const int m = p.count && !p.count_is_k ? min(p.m, live) : p.m, k = p.count && p.count_is_k ? min(p.k, live) : p.k;
  const i64 m0 = (i64)blockIdx.y * kTile, n0 = (i64)blockIdx.x * kTile;
  if (m0 >= m) return;
  const T* a = (const T*)p.a;
  const T* b = (const T*)p.b;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  Acc acc[4][4] = {};
  for (int k0 = 0; k0 < k; k0 += kStep) {
#pragma unroll
    for (int i = threadIdx.x; i < kTile * kStep; i += 256) {
      // Consecutive threads follow the unit stride of the operand.
      const int am = p.a_k == 1 ? i / kStep : i % kTile, ak = p.a_k == 1 ? i % kStep : i / kTile;
      const int bn = p.b_k == 1 ? i / kStep : i % kTile, bk = p.b_k == 1 ? i % kStep : i / kTile;
      a_tile[ak][am] = m0 + am < m && k0 + ak < k ? widen(a[(m0 + am) * p.a_m + (k0 + ak) * p.a_k]) : (Acc)0;
      b_tile[bk][bn] = n0 + bn < p.n && k0 + bk < k ? widen(b[(n0 + bn) * p.b_n + (k0 + bk) * p.b_k]) : (Acc)0;
    }
    __syncthreads();
#pragma unroll
    for (int kk = 0; kk < kStep; kk++) {
      Acc x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; i++) { x[i] = a_tile[kk][4 * ty + i]; y[i] = b_tile[kk][4 * tx + i]; }
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] = fma(x[i], y[j], acc[i][j]);
    }
    __syncthreads();
  }
  const Acc scale = p.scale_at ? *(const Acc*)p.scale_at : (Acc)p.scale;
  const Acc alpha = p.alpha ? *(const Acc*)p.alpha : (Acc)1;
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const i64 row = m0 + 4 * ty + i, column = n0 + 4 * tx + j;
      if (row >= m || column >= p.n) continue;
      Out* at = (Out*)p.d + row * p.d_m + column * p.d_n;
      Acc x = acc[i][j];
      if (p.logits) x = logit_map(x, scale, p.bias ? ((const Acc*)p.bias)[column] : (Acc)0, (Acc)p.softcap);
      else x *= alpha;
      *at = Element<Out>::from(p.accumulate ? (Acc)(widen(*at) + x) : x);
    }
  }
}

}  // namespace

KERNEL(plain_bf16_f32, PlainParams, 256) { plain<bf16, float>(p); }
KERNEL(plain_bf16_bf16, PlainParams, 256) { plain<bf16, bf16>(p); }
KERNEL(plain_f16_f32, PlainParams, 256) { plain<f16, float>(p); }
KERNEL(plain_f16_f16, PlainParams, 256) { plain<f16, f16>(p); }
KERNEL(plain_f32_f32, PlainParams, 256) { plain<float, float>(p); }
KERNEL(plain_f64_f64, PlainParams, 256) { plain<double, double>(p); }
