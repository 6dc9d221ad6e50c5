//! The CPU engine of logitless: softmax losses without the logits.
//!
//! For N rows of D features (`input`, E) and V classes (`weight`, W) the logits are
//!
//! ```text
//! x = logit_scale · E Wᵀ + bias        z = softcap · tanh(x / softcap)
//! ```
//!
//! and nearly every loss is a function of a few *statistics* of each row of z. [`forward`] streams
//! over the classes and computes them; [`backward`] turns their cotangents into gradients, making
//! the logits a second time. Nothing of size N × V is ever held.
//!
//! # Vocabulary
//! - **row** one of N; **class** one of V; **feature** one of D.
//! - **target set** Y of a row: the ids it was given. **R**: all other classes. Statistics of a
//!   softmax run over R, so that no digit of a confident row is lost.
//! - **panel** 32 rows, the lanes of every loop. **tile** the logits of a panel and up to 128
//!   classes, `z[class][32]`. **strip** 32 features of many rows.
//! - **chunk** neighbouring tiles that share a *state* (forward) or a buffer of gradients
//!   (backward). **group** panels that are worked on together.
//! - **saved** the outputs of a forward; **cotangent** the derivative of a loss by one of them.
//! - **live** a row that is neither ignored nor without any cotangent.
//!
//! # Map
//! [`Spec`] names statistics (`stats/`, a file each); [`plan`] sizes a call, `layout` cuts it up;
//! `call` checks it and dispatches by element type and level (`level`, `kernel/`); `head` holds its
//! operands; `forward` and `backward` are the engines, on the threads of `pool` and the memory of
//! `scratch`.
//!
//! Results do not depend on the number of threads, to the last bit.

// Loops over lanes index several arrays at once: zipped iterators would hide that, and a closure
// that the compiler declines to inline loses the instruction set of its caller.
#![allow(clippy::needless_range_loop)]

mod backward;
mod call;
mod cross_entropy;
mod element;
mod error;
mod forward;
mod gradient;
mod head;
mod kernel;
mod layout;
mod level;
mod logsumexp;
mod operands;
mod plan;
mod pool;
mod rows;
mod scratch;
mod spec;
mod stats;
mod tensor;
mod transform;

pub use call::{Gradients, Problem, backward, forward};
pub use cross_entropy::{CrossEntropy, Reduction, Saved};
pub use element::DType;
pub use error::{Error, Result};
pub use level::{level, levels};
pub use logsumexp::{Strided, logsumexp_pairs};
pub use plan::{Memory, Plan, plan, wanted};
pub use pool::{get_num_threads, set_num_threads};
pub use scratch::last_workspace_bytes;
pub use spec::{Field, MAX_TARGETS, Spec};
pub use tensor::{MAX_RANK, Tensor};
