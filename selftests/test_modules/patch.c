// SPDX-License-Identifier: GPL-2.0
/*
 * A livepatch for selftests/livepatch.sh: functions that Matryoshka hooks are taken over by others that count their
 * calls (parameter calls_<function>) and change nothing.
 */
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include "patched.h"

#define DECLARE(module, function)					\
	unsigned long mtk_lp_calls_##function;				\
	unsigned long mtk_lp_past_##function;				\
	module_param_named(calls_##function, mtk_lp_calls_##function, ulong, 0644);
MTK_PATCHED(DECLARE)

#define FUNC(module, function)						\
	{ .old_name = #function, .new_func = mtk_lp_##function },

static struct klp_func kvm_intel_funcs[] = { MTK_PATCHED_KVM_INTEL(FUNC) { } };
static struct klp_func kvm_funcs[] = { MTK_PATCHED_KVM(FUNC) { } };

#define PAST(module, function)						\
	{ mtk_lp_##function, &mtk_lp_past_##function },

static const struct {
	void *func;
	unsigned long *past;
} pasts[] = { MTK_PATCHED(PAST) };

static bool is_call_of_ftrace(const u8 *at)
{
	/* CALL rel32, or the NOP that stands there while nobody traces. */
	return at[0] == 0xe8 || !memcmp(at, "\x0f\x1f\x44\x00\x00", 5);
}

/* Before anybody can come to the new functions: where the old ones go on behind the call of ftrace. */
static int find_pasts(struct klp_object *obj)
{
	const struct klp_func *func;
	int i;

	for (func = obj->funcs; func->old_name; func++) {
		const u8 *at = func->old_func;

		/* Four bytes of ENDBR64, or what the kernel puts in its place. */
		if (!is_call_of_ftrace(at))
			at += 4;
		if (!is_call_of_ftrace(at)) {
			pr_err("%s does not begin with a call of ftrace\n", func->old_name);
			return -EINVAL;
		}
		for (i = 0; i < ARRAY_SIZE(pasts); i++) {
			if (pasts[i].func == func->new_func)
				*pasts[i].past = (unsigned long)at + 5;
		}
	}
	return 0;
}

static struct klp_object objs[] = {
	{ .name = "kvm_intel", .funcs = kvm_intel_funcs, .callbacks.pre_patch = find_pasts },
	{ .name = "kvm", .funcs = kvm_funcs, .callbacks.pre_patch = find_pasts },
	{ }
};

static struct klp_patch patch = {
	.mod = THIS_MODULE,
	.objs = objs,
};

static int __init mtk_livepatch_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit mtk_livepatch_exit(void)
{
}

module_init(mtk_livepatch_init);
module_exit(mtk_livepatch_exit);
MODULE_DESCRIPTION("Counts calls of functions that Matryoshka hooks, by a livepatch");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
