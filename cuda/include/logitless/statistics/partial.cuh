// partial.cuh - what the planes of a tensor-core tile hold for one row: loaded, merged in a fixed
// order, written as outputs.
#pragma once
#include "logitless/common.cuh"
#include "logitless/ptx/math.cuh"
#include "logitless/statistics/maximum.cuh"
#include "logitless/statistics/moments.cuh"
#include "logitless/statistics/rest.cuh"

namespace logitless {

// Entropy of a row; without a class but the targets there is no distribution, and it is 0.
__device__ __forceinline__ float entropy_of(const Rest<float>& rest) {
  return rest.maximum == -infinity() ? rest.excess : rest.entropy();
}

// An output of a row; an ignored one gets 0.
__device__ __forceinline__ void put(void* field, i64 row, int slot, float x) {
  if (field) ((float*)field)[row] = slot < 0 ? 0.f : x;
}


// Puts the block of 256 slots on the list of those to run again, once. In any order: a block's
// results are its own.
__device__ __forceinline__ void list_block(const FinishParams& p, int slot) {
  const int block = slot / 256;
  int* const flags = p.gate + (gate_length(p.list) + 1) / 2;
  if (atomicExch(flags + block, 1) == 0) p.gate[1 + atomicAdd(p.gate, 1)] = block;
}

// Neighbours in a tree.
template <class Partial, int n>
__device__ __forceinline__ Partial fold_pairs(const Partial (&x)[n]) {
  Partial y[n];
#pragma unroll
  for (int i = 0; i < n; i++) y[i] = x[i];
#pragma unroll
  for (int step = 1; step < n; step *= 2)
#pragma unroll
    for (int i = 0; i + step < n; i += 2 * step) y[i].merge(y[i + step]);
  return y[0];
}

// Running maxima: rest, and entropy of three planes.
template <bool kEntropy>
struct OnlinePartial {
  Rest<float> rest;

  static __device__ __forceinline__ OnlinePartial empty() { return {Rest<float>::empty()}; }
  static __device__ __forceinline__ OnlinePartial load(const FinishParams& p, const float* part,
                                                       int at, int) {
    return {{__ldg(part + at), __ldg(part + p.part_plane + at),
             kEntropy ? __ldg(part + 2 * p.part_plane + at) : 0.f}};
  }
  __device__ __forceinline__ void merge(const OnlinePartial& other) { rest.merge(other.rest); }
  // The maximum first, then every term by itself: a fifth of the instructions of merges one by one,
  // which would take longer than their operands.
  template <int n>
  static __device__ __forceinline__ OnlinePartial fold(const OnlinePartial (&x)[n]) {
    Rest<float> all = {x[0].rest.maximum, 0.f, 0.f};
#pragma unroll
    for (int i = 1; i < n; i++) all.maximum = fmaxf(all.maximum, x[i].rest.maximum);
    bool left_out = false;  // one maximum, as always
#pragma unroll
    for (int i = 0; i < n; i++) {
      const Rest<float>& r = x[i].rest;
      const bool same = r.maximum == all.maximum;  // +-inf too
      const bool empty = r.maximum == -infinity() && r.excess == 0.f;
      const float sum = same && !left_out ? r.excess : empty ? 0.f : r.excess + 1.f;
      left_out = left_out || same;
      const float shift = same ? 0.f : r.maximum - all.maximum, factor = ptx::exp2(kLog2e * shift);
      all.excess = fmaf(factor, sum, all.excess);  // a nan stays, whatever its factor
      if (kEntropy) all.moment += factor == 0.f ? 0.f : factor * fmaf(shift, sum, r.moment);
    }
    return {all};
  }
  __device__ __forceinline__ void finish(const FinishParams& p, i64 row, int slot,
                                         float reference) const {
    put(p.out.rest, row, slot, rest.finish());
    if (kEntropy) put(p.out.entropy, row, slot, entropy_of(rest));
    put(p.out.target, row, slot, reference);  // where the products made it
  }
};

// A sum against a fixed reference.
struct FixedPartial {
  double sum;

  static __device__ __forceinline__ FixedPartial empty() { return {0.}; }
  static __device__ __forceinline__ FixedPartial load(const FinishParams&, const float* part,
                                                      int at, int) {
    return {__ldg(part + at)};
  }
  __device__ __forceinline__ void merge(const FixedPartial& other) { sum += other.sum; }
  template <int n>
  static __device__ __forceinline__ FixedPartial fold(const FixedPartial (&x)[n]) {
    return fold_pairs(x);
  }
  __device__ __forceinline__ void finish(const FinishParams& p, i64 row, int slot,
                                         float reference) const {
    if (slot < 0) return put(p.out.rest, row, slot, 0.f);
    const double log_sum = log(sum);
    put(p.out.rest, row, slot, (float)(reference + log_sum));
    // e^+-60 leaves the exponentials of a row 26 nats inside the range of float and bf16. nan is
    // listed too.
    if (p.gate && !(fabs(log_sum) < 60.)) list_block(p, slot);
  }
};

// The same with the first moment of the exponents.
struct FixedMomentPartial {
  double sum, moment;

  static __device__ __forceinline__ FixedMomentPartial empty() { return {0., 0.}; }
  static __device__ __forceinline__ FixedMomentPartial load(const FinishParams& p,
                                                            const float* part, int at, int) {
    return {__ldg(part + at), __ldg(part + p.part_plane + at)};
  }
  __device__ __forceinline__ void merge(const FixedMomentPartial& other) {
    sum += other.sum;
    moment += other.moment;
  }
  template <int n>
  static __device__ __forceinline__ FixedMomentPartial fold(const FixedMomentPartial (&x)[n]) {
    return fold_pairs(x);
  }
  __device__ __forceinline__ void finish(const FinishParams& p, i64 row, int slot,
                                         float reference) const {
    if (slot < 0) {
      put(p.out.entropy, row, slot, 0.f);
      return put(p.out.rest, row, slot, 0.f);
    }
    // Nothing but the target: a reference of +inf after a repair.
    const double log_sum = log(sum), rest = sum == 0. ? log_sum : reference + log_sum;
    const double entropy = sum == 0. ? 0. : log_sum - moment / sum;
    put(p.out.rest, row, slot, (float)rest);
    put(p.out.entropy, row, slot, entropy < 0. ? 0.f : (float)entropy);  // nan stays
    if (p.gate && !(fabs(log_sum) < 60.)) list_block(p, slot);
  }
};

// Running maxima, moments and the maximum over all classes.
struct FullPartial {
  Rest<float> rest;
  Moments<double> moments;
  Maximum<float> maximum;

  static __device__ __forceinline__ FullPartial empty() {
    return {Rest<float>::empty(), Moments<double>::empty(), Maximum<float>::empty()};
  }
  static __device__ __forceinline__ FullPartial load(const FinishParams& p, const float* part,
                                                     int at, int columns) {
    const i64 plane = p.part_plane;
    part += at;
    return {{__ldg(part), __ldg(part + plane), __ldg(part + 2 * plane)},
            Moments<double>::block(columns, __ldg(part + 3 * plane), __ldg(part + 4 * plane)),
            {__ldg(part + 5 * plane), __float_as_int(__ldg(part + 6 * plane))}};
  }
  __device__ __forceinline__ void merge(const FullPartial& other) {
    rest.merge(other.rest);
    moments.merge(other.moments);
    maximum.merge(other.maximum);
  }
  template <int n>
  static __device__ __forceinline__ FullPartial fold(const FullPartial (&x)[n]) {
    return fold_pairs(x);
  }
  __device__ __forceinline__ void finish(const FinishParams& p, i64 row, int slot,
                                         float) const {
    put(p.out.rest, row, slot, rest.finish());
    put(p.out.entropy, row, slot, entropy_of(rest));
    put(p.out.sum, row, slot, (float)moments.sum());
    put(p.out.sum_sq, row, slot, (float)moments.sum_sq());
    put(p.out.mean, row, slot, (float)moments.mean);
    put(p.out.variance, row, slot, (float)moments.variance());
    put(p.out.max, row, slot, maximum.value);
    if (p.out.argmax) p.out.argmax[row] = slot < 0 ? -1 : maximum.id;
  }
};

}  // namespace logitless
