/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What takes the place of a patched function: counts the call and lets the function itself carry it out, arguments as
 * they are. Its address past the call of ftrace is reached by a return, since no indirect branch may end there (IBT).
 */
#include <linux/linkage.h>
#include <asm/ibt.h>
#include <asm/nospec-branch.h>
#include <asm/unwind_hints.h>
#include "patched.h"

#define PASS(module, function)						\
SYM_FUNC_START(mtk_lp_##function) ASM_NL				\
	ENDBR ASM_NL							\
	lock incq mtk_lp_calls_##function(%rip) ASM_NL			\
	push	mtk_lp_past_##function(%rip) ASM_NL			\
	UNWIND_HINT_FUNC ASM_NL						\
	RET ASM_NL							\
SYM_FUNC_END(mtk_lp_##function) ASM_NL

	.text
MTK_PATCHED(PASS)
