/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Trampolines: what ftrace calls in place of a hooked function's first instruction.
 *
 * On entry the stack holds the return address into the function (just past its ftrace call, the
 * "continuation") and under it the function's own return address. The Rust handler gets the
 * function's arguments and the continuation, and answers with two words:
 *
 *   RAX = 0: not handled. The arguments are restored and the stock function goes on.
 *   RAX = 1: handled. RDX is returned to the function's caller; the stock function does not run.
 *
 * Livepatch may have replaced the continuation, which is why it is read and not computed.
 */
#include <linux/linkage.h>
#include <asm/asm.h>
#include <asm/ibt.h>
#include <asm/nospec-branch.h>
#include <asm/unwind_hints.h>
#include "hook_abi.h"

.macro MTK_TRAMPOLINE id:req nargs:req
SYM_FUNC_START(mtk_tramp_\id)
	ENDBR
	push	%rdi
	.if \nargs > 1
	push	%rsi
	.endif
	.if \nargs > 2
	push	%rdx
	.endif
	.if \nargs > 3
	push	%rcx
	.endif
	.if \nargs > 4
	push	%r8
	.endif
	.if \nargs == 1
	mov	8(%rsp), %rsi
	.elseif \nargs == 2
	mov	16(%rsp), %rdx
	.elseif \nargs == 3
	mov	24(%rsp), %rcx
	.elseif \nargs == 4
	mov	32(%rsp), %r8
	.else
	mov	40(%rsp), %r9
	.endif
	call	mtk_on_\id
	test	%eax, %eax
	jz	.Lstock_\id
	mov	%rdx, %rax
	add	$(8 * \nargs + 8), %rsp
	UNWIND_HINT_FUNC
	RET
.Lstock_\id:
	.if \nargs > 4
	pop	%r8
	.endif
	.if \nargs > 3
	pop	%rcx
	.endif
	.if \nargs > 2
	pop	%rdx
	.endif
	.if \nargs > 1
	pop	%rsi
	.endif
	pop	%rdi
	RET
SYM_FUNC_END(mtk_tramp_\id)
.endm

	.text
#define HOOK_TRAMPOLINE(id, mod, sym, nargs) MTK_TRAMPOLINE id nargs ASM_NL
MTK_HOOKS(HOOK_TRAMPOLINE)

/* unsigned long mtk_call_stock(continuation, a0, a1, a2, a3, a4) */
SYM_FUNC_START(mtk_call_stock)
	push	%rdi
	mov	%rsi, %rdi
	mov	%rdx, %rsi
	mov	%rcx, %rdx
	mov	%r8, %rcx
	mov	%r9, %r8
	UNWIND_HINT_FUNC
	RET
SYM_FUNC_END(mtk_call_stock)

/* unsigned long mtk_call_stock2(continuation, a0, a1) */
SYM_FUNC_START(mtk_call_stock2)
	push	%rdi
	mov	%rsi, %rdi
	mov	%rdx, %rsi
	UNWIND_HINT_FUNC
	RET
SYM_FUNC_END(mtk_call_stock2)

/* unsigned long mtk_call_stock7(function, a0, a1, a2, a3, a4, a5, a6); a6 goes on the stack */
SYM_FUNC_START(mtk_call_stock7)
	push	16(%rsp)
	mov	16(%rsp), %rax
	call	mtk_enter7
	add	$8, %rsp
	RET
SYM_FUNC_END(mtk_call_stock7)

SYM_FUNC_START_LOCAL(mtk_enter7)
	push	%rdi
	mov	%rsi, %rdi
	mov	%rdx, %rsi
	mov	%rcx, %rdx
	mov	%r8, %rcx
	mov	%r9, %r8
	mov	%rax, %r9
	UNWIND_HINT_FUNC
	RET
SYM_FUNC_END(mtk_enter7)

#define HOOK_STRINGS(id, mod, sym, nargs)				\
	.Lmod_##id: .asciz #mod ASM_NL					\
	.Lsym_##id: .asciz #sym ASM_NL
	.section .rodata.str1.1, "aMS", @progbits, 1
MTK_HOOKS(HOOK_STRINGS)
#define CALL_STRINGS(id, mod, sym, nargs)				\
	.Lcall_mod_##id: .asciz #mod ASM_NL				\
	.Lcall_sym_##id: .asciz #sym ASM_NL
MTK_CALLS(CALL_STRINGS)

/* struct mtk_hook_entry mtk_hook_table[MTK_HOOK_COUNT] */
#define HOOK_ENTRY(id, mod, sym, nargs)					\
	.quad .Lmod_##id, .Lsym_##id, mtk_tramp_##id, nargs ASM_NL
	.section .rodata, "a"
	.balign 8
SYM_DATA_START(mtk_hook_table)
MTK_HOOKS(HOOK_ENTRY)
SYM_DATA_END(mtk_hook_table)

/* struct mtk_hook_entry mtk_call_table[MTK_CALL_COUNT] */
#define CALL_ENTRY(id, mod, sym, nargs)					\
	.quad .Lcall_mod_##id, .Lcall_sym_##id, 0, nargs ASM_NL
SYM_DATA_START(mtk_call_table)
MTK_CALLS(CALL_ENTRY)
SYM_DATA_END(mtk_call_table)
