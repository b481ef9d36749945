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
static const int RING_STAGES = 6;
static const int RING_BYTES = 52224;
static const int STAGE_PIECES = 8;
static const int RESIDENT_HEADER_BYTES = 119808;
static const int SLOTS_MAX = 64;
static const int ACTIVE_MAX = 8;
static const int EXPERTS_MAX = 512;
static const int STRIP_FP4 = 0;
static const int STRIP_FP8 = 1;
static const int STRIP_BF16 = 2;
static const int STRIP_F32 = 3;
struct LinearArgs { const uint8_t* weights; const float* x; float* out; int tiles; int k; };
struct OpArgs { void* p[8]; int op; int n[8]; float f[3]; };
static const int DO_EMBED = 0;
static const int DO_QKV = 1;
static const int DO_ATTENTION = 2;
static const int DO_O_PROJ = 3;
static const int DO_ALL_REDUCE = 4;
static const int DO_ROUTER = 5;
static const int DO_GATE_UP = 6;
static const int DO_DOWN = 7;
static const int DO_LM_HEAD = 8;
static const int DO_CHOOSE = 9;
struct Instr { const uint8_t* pages; const void* x; void* out; void* squares; const void* weight; const void* table; void* residual; const void* logits; const void* bias; void* keys; void* values; const void* sinks; const void* turns; void* bests; int op; int wait; int stage; int format; int tiles; int strips; int blocks; int page_blocks; int parts; int index; int experts; int active; int normalise; int hidden; int hidden_padded; int logit_rows; int logit_parts; int heads; int kv_heads; int qk_dim; int v_dim; int rope_dims; int window; int k_first; int v_first; int qkv_rows; int columns_padded; int inner_padded; int pair_columns; int first_token; int rows; int stage_bytes; int reserved; float eps; float scaling; float value_scale; };
struct StepState { int rows; int position; int chain; int accepted; int tokens[8]; int best[8]; uint32_t distinct; uint32_t routed; };
struct StepArgs { const Instr* program; uint32_t* counters; StepState* state; long long* stamps; dev::Fault* fault; dev::Word* inbox[8]; dev::Word* choice[8]; int instructions; int ranks; int rank; int words; int first_step; int steps; int sums; int x_bytes; int context; int ring_stages; };
