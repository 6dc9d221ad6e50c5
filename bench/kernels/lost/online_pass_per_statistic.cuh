// LOST: online statistics with one pass over the registers for each statistic, unrolled over both fragments of a warp.
// H200, 8192 x 65536 x 1024, all seven planes: 2.70 ms, where E W^T by cuBLAS takes 1.80 (1.50); in one pass 2.26 (1.43); in one pass,
// looping over the fragments, 1.86 (1.14): cuda/include/logitless/epilogue/{online,fragments}.cuh.
// Why: straight-line code that runs once a tile falls out of the instruction cache. At D >= 2304 the mainloop hides all of them.
// online.cuh - statistics that need no reference: each class block carries its own maximum.
//
// Per row and class block (R: its classes other than the row's target; all: target included)
//   plane 0   max over R; -inf where R is empty or everything in it is -inf
//   plane 1   excess = sum over R, one maximum left out, of e^(z - max): 1 + excess is the block's sum, and a peaked row keeps
//             every digit of it
//   plane 2   moment = sum over R of (z - max) e^(z - max)
// and with kMoments
//   plane 3   sum over all of z          plane 4   sum over all of (z - block mean)^2
//   plane 5   max over all; nan wins     plane 6   its class (bits of an int): the lowest id among equals
// Every statistic is a pass over registers. The quad of lanes that shares a row agrees on the maximum before the exponentials, so
// that its sums are plain additions. Blocks merge by statistics/rest.cuh and statistics/moments.cuh.
#pragma once
#include "logitless/epilogue/maps.cuh"

namespace logitless {

template <class Map, bool kMoments>
struct OnlineEpilogue {
  static constexpr int kPanels = 0;
  static constexpr bool kGated = true;

  // Lowest column offset with z == value, or (nan) with a nan; -1 for none.
  template <int kColumns>
  static __device__ __forceinline__ int find(const float (&z)[kColumns / 2], const Band& band, const Exceptions& ex, int half,
                                             float value, bool nan) {
    int best = 1 << 30;
#pragma unroll
    for (int i = kColumns / 2 - 1; i >= 0; i--) {
      if (half_of(i) != half) continue;
      const bool hit = nan ? z[i] != z[i] : z[i] == value;
      best = hit && ex.is_class(i) ? offset_of(i) : best;
    }
    best = ptx::quad_min(best < (1 << 30) ? best + 2 * (band.lane & 3) : best);
    return best < (1 << 30) ? best : -1;
  }

  template <int kColumns, bool kCareful>
  static __device__ __forceinline__ void moments(const float (&z)[kColumns / 2], const Band& band, const Exceptions& ex) {
    const float n = static_cast<float>(min(kColumns, band.p.n - band.column));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = 0.f, top = -infinity();
#pragma unroll
      for (int i = 0; i < kColumns / 2; i++) {
        if (half_of(i) != half || (kCareful && !ex.is_class(i))) continue;
        sum += z[i];
        top = fmaxf(top, z[i]);
      }
      sum = ptx::quad_sum(sum);
      top = ptx::quad_max(top);
      const float mean = sum / n;
      float spread = 0.f;
#pragma unroll
      for (int i = 0; i < kColumns / 2; i++) {
        if (half_of(i) != half || (kCareful && !ex.is_class(i))) continue;
        spread = fmaf(z[i] - mean, z[i] - mean, spread);
      }
      spread = ptx::quad_sum(spread);
      int where = find<kColumns>(z, band, ex, half, top, false);
      if (__any_sync(kFullWarp, sum != sum)) {  // a nan among the logits, or inf - inf
        const int nan = find<kColumns>(z, band, ex, half, 0.f, true);
        if (nan >= 0) {
          where = nan;
          top = __int_as_float(0x7fffffff);
        }
      }
      band.emit(3, half, sum);
      band.emit(4, half, spread);
      band.emit(5, half, top);
      band.emit(6, half, __int_as_float(band.p.col0 + band.column + (where < 0 ? 0 : where)));
    }
  }

  template <int kColumns, bool kCareful>
  static __device__ __forceinline__ void body(const float (&z)[kColumns / 2], const Band& band, const Exceptions& ex) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = -infinity();
#pragma unroll
      for (int i = 0; i < kColumns / 2; i++)
        if (half_of(i) == half) top = fmaxf(top, kCareful && !ex.is_rest(i) ? -infinity() : z[i]);
      top = ptx::quad_max(top);
      const float origin = fabsf(top) == infinity() ? 0.f : top;  // never inf - inf
      const float offset = -kLog2e * origin;
      float excess = 0.f, moment = 0.f, ties = 0.f;
#pragma unroll
      for (int i = 0; i < kColumns / 2; i++) {
        if (half_of(i) != half) continue;
        const float t = fmaf(z[i], kLog2e, offset);
        float e = ptx::exp2(t);
        if (kCareful) e = ex.is_rest(i) ? e : 0.f;
        const bool maximal = z[i] == top && (!kCareful || ex.is_rest(i));
        ties += maximal ? 1.f : 0.f;
        excess += maximal ? 0.f : e;
        moment = fmaf(e, fmaxf(t, -200.f), moment);
      }
      ties = ptx::quad_sum(ties);
      excess = ptx::quad_sum(excess) + fmaxf(ties - 1.f, 0.f);
      moment = kLn2 * ptx::quad_sum(moment);
      const bool empty = top == -infinity() && excess == excess;  // nothing but -inf (a nan makes excess nan)
      band.emit(0, half, top);
      band.emit(1, half, empty ? 0.f : excess);
      band.emit(2, half, empty ? 0.f : moment);
    }
  }

  template <int kColumns, class Store>
  static __device__ __forceinline__ void run(float (&acc)[kColumns / 2], const Band& band, Store&) {
    Map::template apply<kColumns>(acc, band);
    const float factor = Map::factor(band.p);
    if (factor != 1.f) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; i++) acc[i] *= factor;
    }
    const Exceptions ex = Exceptions::find<kColumns>(band);
    if (ex.any) body<kColumns, true>(acc, band, ex);
    else body<kColumns, false>(acc, band, ex);
    if (kMoments) {
      if (band.ragged(kColumns)) moments<kColumns, true>(acc, band, ex);
      else moments<kColumns, false>(acc, band, ex);
    }
  }
};

}  // namespace logitless
