// silu(gate) * up, not clamped. Definition: model/src/reference/swiglu.rs. In the engine a thread holds the gate row r and the
// up row r + 8 of a fragment, so this is the epilogue of one product.
#pragma once
#include "dev.cuh"

DEV float sigmoid(float x) { return 1.0f / (1.0f + dev::exp_(-x)); }
DEV float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }
