// Made by src/layout.rs (its test writes it anew when KILOTOK_BLESS=1). Do not edit.
#pragma once
#include "dev.cuh"
static const int BLOCK_ROWS = 64;
static const int BLOCK_COLUMNS = 128;
static const int FP4_BLOCK_BYTES = 4352;
static const int FP4_BLOCKS_PER_PAGE = 4;
static const int FP8_BLOCK_BYTES = 8208;
static const int FP8_BLOCKS_PER_PAGE = 2;
static const int LINEAR_STAGES = 3;
static const int LINEAR_WINDOW = 0;
static const int TOKENS = 8;
struct LinearArgs { const uint8_t* weights; const float* x; float* out; int tiles; int k; };
struct OpArgs { void* p[8]; int op; int n[8]; float f[3]; };
