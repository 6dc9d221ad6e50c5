//! The CUDA engine.
mod images;
