//! The CUDA engine of logitless: the row statistics of the CPU engine, on tensors in device memory.
//!
//! The kernels live in `cuda/`, are compiled when this crate is built (`build/`) and embedded in it.
//! Nothing links to CUDA: `driver` opens `libcuda` when a CUDA tensor first arrives. Nothing here
//! allocates device memory, waits for a device or reads anything back: [`plan`] says how many bytes
//! a call needs, the caller's framework allocates them on its stream, and a call only enqueues.
//!
//! # Map
//! `driver` the facade · `images` which kernel runs where · `launch` a stream and typed launches ·
//! `params` the kernels' parameters · `product` one matrix product, on tensor cores where they fit,
//! `choice` its kernel · `plan`, `share`, `partly` sizes, `layout` buffers · `forward`, `backward`,
//! `keep`, `tiles`, `sums`, `stored`, `frozen` the compositions, `blocks` of rows where there are many ·
//! `loss` a cross entropy of them, `policy` log-probability and entropy · `info` what there is.
//!
//! # Two paths
//! *Fused*: statistics, or the gradient of the logits, are made in the epilogue of E Wᵀ.
//! *Tiled*: E Wᵀ writes a tile of logits, which row kernels fold or turn into gradients; it serves
//! what the epilogues do not (several targets, powers, class vectors, dense targets, top-k, double).
//! *Stored* is fused with exponentials kept from forward to backward: three products, not four.
//! *Frozen*: only the input's gradient is wanted, and the forward makes it but for factors: two.

mod backward;
mod blocks;
mod call;
mod choice;
mod driver;
mod error;
mod forward;
mod frozen;
mod images;
mod info;
mod keep;
mod kept;
mod launch;
mod layout;
mod loss;
mod params;
mod partly;
mod plan;
mod policy;
mod product;
mod scaled;
mod share;
mod stored;
mod sums;
mod tiles;
mod widths;

pub use backward::backward;
pub use error::{Error, Result};
pub use forward::forward;
pub use info::{DeviceInfo, Info, info, warm_up};
pub use loss::{Kept, cross_entropy_backward, cross_entropy_forward};
pub use plan::{Plan, describable, plan};
pub use policy::{Policy, policy_backward, policy_forward};
pub use share::{Lends, Outputs};
