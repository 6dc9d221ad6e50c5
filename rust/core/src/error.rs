//! What can be wrong with a call, told with values and the remedy.

/// A call that cannot be carried out. Found before any work is done.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A statistic that the registry does not list.
    #[error("statistics: unknown statistic {name:?}; expected some of {known}")]
    UnknownStatistic {
        /// What was asked for.
        name: String,
        /// The registry, comma separated.
        known: String,
    },
    /// A number outside its range.
    #[error("{argument} = {value}; expected {expected}")]
    Value {
        /// The argument.
        argument: &'static str,
        /// Its value.
        value: String,
        /// What it must be, and the remedy.
        expected: String,
    },
    /// A tensor of the wrong shape.
    #[error("{argument} has shape {shape:?}; expected {expected}")]
    Shape {
        /// The argument.
        argument: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// What it must be, and the remedy.
        expected: String,
    },
    /// A tensor of the wrong element type.
    #[error("{argument} has dtype {dtype}; expected {expected}")]
    DType {
        /// The argument.
        argument: &'static str,
        /// Its element type.
        dtype: &'static str,
        /// What it must be, and the remedy.
        expected: String,
    },
    /// An argument that the call needs and did not get.
    #[error("{argument} is missing; expected {expected}")]
    Missing {
        /// The argument.
        argument: &'static str,
        /// What it must be, and why.
        expected: String,
    },
    /// A target id that names no class.
    #[error(
        "target[{row}] = {value} is out of range; expected a class id in [0, {classes}), \
         or ignore_index for positions to skip"
    )]
    Target {
        /// First offending row.
        row: usize,
        /// The id there.
        value: i64,
        /// V.
        classes: usize,
    },
    /// Scratch memory that the system does not give.
    #[error("cannot allocate {bytes} bytes of scratch; use fewer threads or fewer rows a call")]
    Memory {
        /// What the plan asked for.
        bytes: usize,
    },
    /// A level in `LOGITLESS_CPU` that is unknown or that the machine lacks.
    #[error("LOGITLESS_CPU={value:?} is not available here; expected one of {levels}")]
    Level {
        /// The variable's value.
        value: String,
        /// Levels of this machine, comma separated.
        levels: String,
    },
}

/// The result of a call.
pub type Result<T> = std::result::Result<T, Error>;
