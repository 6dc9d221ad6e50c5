// loss.cu - cross entropy from what the engine keeps of a row, reduced, or log-probability and
// entropy; and their cotangents.
//
// With x = rest - target, the log of what the other classes weigh beside the target, they have
// p = 1 / (1 + e^-x) of the probability and the target has q = 1 / (1 + e^x):
//   loss = log(1 + e^x), lse = loss + target, and z_loss * lse^2 where it is asked for;
//   d loss / d rest = p = -d loss / d target;
//   log_prob = -loss; with h, the entropy among the others,
//   entropy = p log(1 + e^-x) + q log(1 + e^x) + p h, a sum of positive terms;
//   d entropy / d rest = p q (h - x) = -d entropy / d target, d entropy / d h = p
// One launch each way: in a framework's own operations it is some twenty of 3 us, 2.5% of a
// training step at D = 768, V = 50257. A sum over rows is one block's, in double and in a fixed
// order.
//
// No shared memory but 48 doubles; 15 to 62 registers, no spills.
#include "logitless/common.cuh"

using namespace logitless;

namespace {

constexpr int kThreads = 1024;

template <class T>
__device__ __forceinline__ T softplus(T x) {
  return x > T(40) ? x : log1p(exp(x));
}

template <class T>
struct Row {
  T x, target;

  __device__ __forceinline__ Row(const LossParams& p, i64 row)
      : Row(((const T*)p.rest)[row], ((const T*)p.target)[row]) {}
  __device__ __forceinline__ Row(T rest, T target) : x(rest - target), target(target) {
    // A logit of +inf: the softmax is inf / inf.
    if (rest == infinite<T>() || target == infinite<T>()) x = not_a_number<T>();
  }
  __device__ __forceinline__ T cross_entropy() const { return softplus(x); }
  // Probability of the other classes and of the target: neither is made as 1 less the other.
  __device__ __forceinline__ T p_rest() const { return T(1) / (T(1) + exp(-x)); }
  __device__ __forceinline__ T p_target() const { return T(1) / (T(1) + exp(x)); }
  __device__ __forceinline__ T loss(const LossParams& p) const {
    const T plain = cross_entropy();
    if (p.z_loss == 0.) return plain;
    const T lse = plain + target;
    return plain + T(p.z_loss) * lse * lse;
  }
};

template <class Params>
__device__ __forceinline__ bool kept(const Params& p, i64 row) {
  return p.ids[row] != p.ignore;
}

// A thread a row.
template <class T>
__device__ __forceinline__ void each_row(const LossParams& p) {
  const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (row < p.rows) ((T*)p.loss)[row] = kept(p, row) ? Row<T>(p, row).loss(p) : T(0);
}

// One block: the sum or the mean, and what the backward multiplies by.
template <class T>
__device__ __forceinline__ void total(const LossParams& p) {
  __shared__ double warp_total[kThreads / 32];
  __shared__ int warp_count[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  double sum = 0.;
  int count = 0;
  struct Loaded {
    T rest, target;
    bool kept;
  };
  auto load = [&](int row) {
    return Loaded{((const T*)p.rest)[row], ((const T*)p.target)[row], kept(p, row)};
  };
  // Few registers, for a block of 1024 threads, hold 8 rows of float and 4 of double.
  in_batches<32 / sizeof(T)>(threadIdx.x, kThreads, (int)p.rows, load, [&](int, const Loaded& row) {
    if (!row.kept) return;
    sum += (double)Row<T>(row.rest, row.target).loss(p);
    count++;
  });
  sum = warp_sum(sum);
  count = warp_sum(count);
  if (lane == 0) {
    warp_total[warp] = sum;
    warp_count[warp] = count;
  }
  __syncthreads();  // the first warp reads what every warp wrote
  if (warp) return;
  sum = warp_sum(warp_total[lane]);
  count = warp_sum(warp_count[lane]);
  if (lane) return;
  const double divisor = p.mean ? (double)count : 1.;
  *(T*)p.loss = (T)(sum / divisor);  // 0 / 0 where no row is kept, as torch has it
  *(T*)p.share = (T)(1. / divisor);
}

template <class T>
__device__ __forceinline__ void slopes(const LossParams& p) {
  const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  T rest = 0, target = 0;
  if (kept(p, row)) {
    const Row<T> r(p, row);
    const T g =
        p.per_row ? ((const T*)p.gradient)[row] : *(const T*)p.gradient * *(const T*)p.share;
    rest = g * r.p_rest();
    target = -rest;
    if (p.z_loss != 0.) {
      const T twice = g * T(2. * p.z_loss) * (r.cross_entropy() + r.target);
      rest += twice * r.p_rest();
      target += twice * r.p_target();
    }
  }
  ((T*)p.g_rest)[row] = rest;
  ((T*)p.g_target)[row] = target;
}

// p x, 0 where p is: x may be infinite there.
template <class T>
__device__ __forceinline__ T weighted(T p, T x) {
  return p == T(0) ? T(0) : p * x;
}

// A thread a row.
template <class T>
__device__ __forceinline__ void policy(const PolicyParams& p) {
  const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  T log_prob = 0, entropy = 0;
  if (kept(p, row)) {
    const Row<T> r(((const T*)p.rest)[row], ((const T*)p.target)[row]);
    log_prob = -r.cross_entropy();
    const T others = r.p_rest();
    entropy = weighted(others, softplus(-r.x)) + weighted(r.p_target(), -log_prob) +
              others * ((const T*)p.rest_entropy)[row];
  }
  ((T*)p.log_prob)[row] = log_prob;
  ((T*)p.entropy)[row] = entropy;
}

template <class T>
__device__ __forceinline__ void policy_slopes(const PolicyParams& p) {
  const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  T rest = 0, rest_entropy = 0;
  if (kept(p, row)) {
    const Row<T> r(((const T*)p.rest)[row], ((const T*)p.target)[row]);
    const T others = r.p_rest();
    if (p.g_log_prob) rest = -((const T*)p.g_log_prob)[row] * others;
    if (p.g_entropy) {
      rest_entropy = ((const T*)p.g_entropy)[row] * others;
      const T ahead = ((const T*)p.rest_entropy)[row] - r.x;
      rest += ((const T*)p.g_entropy)[row] * weighted(others * r.p_target(), ahead);
    }
  }
  ((T*)p.g_rest)[row] = rest;
  ((T*)p.g_target)[row] = -rest;
  if (p.g_rest_entropy) ((T*)p.g_rest_entropy)[row] = rest_entropy;
}

}  // namespace

KERNEL(loss_rows_f32, LossParams, 256) { each_row<float>(p); }
KERNEL(loss_rows_f64, LossParams, 256) { each_row<double>(p); }
KERNEL(loss_total_f32, LossParams, kThreads) { total<float>(p); }
KERNEL(loss_total_f64, LossParams, kThreads) { total<double>(p); }
KERNEL(loss_slopes_f32, LossParams, 256) { slopes<float>(p); }
KERNEL(loss_slopes_f64, LossParams, 256) { slopes<double>(p); }
KERNEL(policy_rows_f32, PolicyParams, 256) { policy<float>(p); }
KERNEL(policy_rows_f64, PolicyParams, 256) { policy<double>(p); }
KERNEL(policy_slopes_f32, PolicyParams, 256) { policy_slopes<float>(p); }
KERNEL(policy_slopes_f64, PolicyParams, 256) { policy_slopes<double>(p); }
