//! The engine: row statistics of E Wᵀ, streamed.
