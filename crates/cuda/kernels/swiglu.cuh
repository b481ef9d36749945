// silu(gate) * up, not clamped. Definition: model/src/reference/swiglu.rs. In the engine a thread holds the gate row r and the
// up row r + 8 of a fragment, so this is the epilogue of one product.
#pragma once
#include "dev.cuh"

// To 1e-6 of itself for |x| up to 16: two operations of the chip instead of thirty, in code that runs once a layer.
DEV float sigmoid(float x) { return dev::reciprocal(1.0f + dev::exp_quick(-x)); }
DEV float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }
