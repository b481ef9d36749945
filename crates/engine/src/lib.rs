//! One thread that owns one Decoder: queue, sessions, prefix cache, stop rules.
#![forbid(unsafe_code)]
