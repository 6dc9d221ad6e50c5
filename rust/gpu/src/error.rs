//! What can go wrong on the way to a kernel.

/// A call that could not be made, with the remedy where there is one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The arguments are wrong; nothing was launched.
    #[error(transparent)]
    Call(#[from] logitless_core::Error),
    /// There is no way to run CUDA code in this process.
    #[error("CUDA tensors cannot be used: {reason}")]
    Unavailable {
        /// Why, and the remedy.
        reason: String,
    },
    /// The driver refused a call.
    #[error("{call}: {name} ({text})")]
    Driver {
        /// The function and what it was called for.
        call: String,
        /// The driver's name of the error.
        name: String,
        /// The driver's description.
        text: String,
    },
    /// No image of a kernel fits the device.
    #[error(
        "no image of kernel {kernel} fits {device}; `logitless info` lists the images of this build"
    )]
    NoImage {
        /// The kernel.
        kernel: String,
        /// The device's name and compute capability.
        device: String,
    },
}

/// The result of a call.
pub type Result<T> = std::result::Result<T, Error>;
