// SPDX-License-Identifier: GPL-2.0
/*
 * A data race for scripts/sanitize: two processors count in the same variable without a lock. A KCSAN that says nothing of
 * this finds nothing else either.
 */
#include <linux/completion.h>
#include <linux/err.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/sched.h>

#define COUNTERS 2
#define ROUNDS 400000

static unsigned long mtk_raced;
static struct completion done[COUNTERS];

static int mtk_race(void *completion)
{
	unsigned long i;

	for (i = 0; i < ROUNDS; i++) {
		mtk_raced++;
		barrier();
		if (i % 256 == 0)
			cond_resched();
	}
	complete(completion);
	return 0;
}

static int __init mtk_race_init(void)
{
	struct task_struct *task;
	int i, error = 0;

	for (i = 0; i < COUNTERS; i++) {
		init_completion(&done[i]);
		task = kthread_create(mtk_race, &done[i], "mtk_race/%d", i);
		if (IS_ERR(task)) {
			error = PTR_ERR(task);
			break;
		}
		kthread_bind(task, i % num_online_cpus());
		wake_up_process(task);
	}
	/* Those that were begun use this module. */
	while (i--)
		wait_for_completion(&done[i]);
	pr_info("mtk_race: %lu of %d\n", mtk_raced, COUNTERS * ROUNDS);
	return error;
}

static void __exit mtk_race_exit(void)
{
}

module_init(mtk_race_init);
module_exit(mtk_race_exit);
MODULE_DESCRIPTION("Matryoshka selftest: a data race");
MODULE_LICENSE("GPL");
