/* SPDX-License-Identifier: GPL-2.0 */
/* What the assembly and the Rust half of the hook engine share. */
#ifndef MTK_HOOK_ABI_H
#define MTK_HOOK_ABI_H

#include "hooks.h"

#ifndef __ASSEMBLY__
#include <linux/types.h>

#define MTK_HOOK_ENUM(id, mod, sym, nargs) MTK_HOOK_##id,
enum mtk_hook_id { MTK_HOOKS(MTK_HOOK_ENUM) MTK_HOOK_COUNT };

#define MTK_CALL_ENUM(id, mod, sym, nargs) MTK_CALL_##id,
enum mtk_call_id { MTK_CALLS(MTK_CALL_ENUM) MTK_CALL_COUNT };

/**
 * struct mtk_hook_entry - one line of either table, as trampoline.S lays it out
 * @module: name of the module that holds the function
 * @symbol: name of the function
 * @trampoline: address that ftrace calls; 0 for a function that is only called
 * @nargs: how many arguments the function takes
 */
struct mtk_hook_entry {
	const char *module;
	const char *symbol;
	unsigned long trampoline;
	unsigned long nargs;
};

extern const struct mtk_hook_entry mtk_hook_table[];
extern const struct mtk_hook_entry mtk_call_table[];

/**
 * mtk_call_stock() - run the stock function past its ftrace call site
 * @continuation: where the trampoline would have gone on
 * @a0: first argument
 * @a1: second argument
 * @a2: third argument
 * @a3: fourth argument
 * @a4: fifth argument
 *
 * IBT forbids an indirect call into the middle of a function; a return is allowed.
 */
unsigned long mtk_call_stock(unsigned long continuation, unsigned long a0, unsigned long a1,
			     unsigned long a2, unsigned long a3, unsigned long a4);

/**
 * mtk_call_stock2() - mtk_call_stock() for a function of one or two arguments
 * @continuation: where to go on
 * @a0: first argument
 * @a1: second argument
 */
unsigned long mtk_call_stock2(unsigned long continuation, unsigned long a0, unsigned long a1);

/**
 * mtk_call_stock7() - mtk_call_stock() for a function of seven arguments
 * @function: where to go on
 * @a0: first argument
 * @a1: second argument
 * @a2: third argument
 * @a3: fourth argument
 * @a4: fifth argument
 * @a5: sixth argument
 * @a6: seventh argument
 */
unsigned long mtk_call_stock7(unsigned long function, unsigned long a0, unsigned long a1,
			      unsigned long a2, unsigned long a3, unsigned long a4,
			      unsigned long a5, unsigned long a6);
#endif /* __ASSEMBLY__ */
#endif /* MTK_HOOK_ABI_H */
