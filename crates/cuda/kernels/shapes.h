// What the compiler knows of a model's instructions: nothing here. src/shapes.rs writes such a file for a model, where SHAPES_KNOWN is defined
// and constants hide the fields of the same name, and the compiler then takes that one.
#pragma once
#include "layout.h"
#if !defined(SHAPES_KNOWN)
typedef Instr AllReduceInstr;
typedef Instr AttentionInstr;
typedef Instr DraftAttentionInstr;
typedef Instr AppendInstr;
typedef Instr RoutedGateUpInstr;
#define SHAPES_DRAFT 1
#define SHAPES_PRODUCTS(X)  // X(type, pass or -1, op, whether experts are routed) for every kind of product that the model has
#endif
