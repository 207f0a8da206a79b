// SPDX-License-Identifier: GPL-2.0
/*
 * The emulated host's end of the line to the runner.
 *
 * Runs a command in the guest and tells the runner what it prints and how it ended;
 * sends files. Everything travels as frames through the emulator's debug port 0xe9,
 * which is a byte stream to the emulator's standard output:
 *
 *	magic "\x01MTK" | type | length (4 bytes, little endian) | payload | sum (1 byte)
 *
 * The sum is that of all payload bytes modulo 256. Only one process may send at a
 * time, so the command's output comes to us through pipes.
 *
 *	agent run COMMAND [ARG]...	frames O and E (its output), then X (wait status)
 *	agent send TYPE			standard input, as frames of one-letter type TYPE
 *	agent off			leave the emulator
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/wait.h>
#include <unistd.h>

#define PORT_E9		0xe9	/* out: one byte; in: flush, answers 0xe9 */
#define PORT_OFF	0x8900	/* the string "Shutdown" ends the emulator */

static void put(const void *data, size_t len)
{
	asm volatile("rep outsb" : "+S"(data), "+c"(len) : "d"(PORT_E9) : "memory");
}

static void frame(char type, const void *data, uint32_t len)
{
	const unsigned char *bytes = data;
	unsigned char head[9] = { 1, 'M', 'T', 'K', type, len, len >> 8, len >> 16, len >> 24 };
	unsigned char sum = 0;

	for (uint32_t i = 0; i < len; i++)
		sum += bytes[i];
	put(head, sizeof(head));
	put(data, len);
	put(&sum, 1);
	inb(PORT_E9);
}

/* Pass on what FD has; returns 0 at its end. */
static int relay(int fd, char type)
{
	static char buf[65536];
	ssize_t n;

	do {
		n = read(fd, buf, sizeof(buf));
	} while (n < 0 && errno == EINTR);
	if (n <= 0)
		return 0;
	frame(type, buf, n);
	return 1;
}

static int run(char **argv)
{
	static const char types[2] = { 'O', 'E' };
	struct pollfd p[2];
	int out[2], err[2], status, reaped = 0, open_ends = 2;
	pid_t child;

	if (pipe(out) || pipe(err)) {
		perror("emu-agent: pipe");
		return 1;
	}
	child = fork();
	if (child < 0) {
		perror("emu-agent: fork");
		return 1;
	}
	if (!child) {
		setsid();
		dup2(out[1], 1);
		dup2(err[1], 2);
		close(out[0]), close(out[1]), close(err[0]), close(err[1]);
		execvp(argv[0], argv);
		fprintf(stderr, "emu-agent: %s: %s\n", argv[0], strerror(errno));
		_exit(errno == ENOENT ? 127 : 126);
	}
	close(out[1]), close(err[1]);
	p[0] = (struct pollfd){ .fd = out[0], .events = POLLIN };
	p[1] = (struct pollfd){ .fd = err[0], .events = POLLIN };

	while (open_ends) {
		/*
		 * Something the command left in the background may hold the pipes open
		 * for good: once the command is gone, wait only for what is on its way.
		 */
		int n = poll(p, 2, reaped ? 0 : 200);

		if (n == 0 && reaped)
			break;
		for (int i = 0; i < 2; i++) {
			if (p[i].fd >= 0 && p[i].revents && !relay(p[i].fd, types[i])) {
				p[i].fd = -1;
				open_ends--;
			}
		}
		if (!reaped && waitpid(child, &status, WNOHANG) == child)
			reaped = 1;
	}
	if (!reaped)
		while (waitpid(child, &status, 0) < 0 && errno == EINTR)
			;
	status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
	unsigned char code = status;

	frame('X', &code, 1);
	return 0;
}

static int usage(void)
{
	fprintf(stderr, "usage: emu-agent run COMMAND [ARG]... | send TYPE | off\n");
	return 2;
}

int main(int argc, char **argv)
{
	if (ioperm(PORT_E9, 1, 1) || ioperm(PORT_OFF, 1, 1)) {
		perror("emu-agent: ioperm (it needs root)");
		return 1;
	}
	if (argc < 2)
		return usage();
	if (!strcmp(argv[1], "run") && argc > 2)
		return run(argv + 2);
	if (!strcmp(argv[1], "send") && argc > 2) {
		while (relay(0, argv[2][0]))
			;
		return 0;
	}
	if (!strcmp(argv[1], "off")) {
		static const char word[] = "Shutdown";

		inb(PORT_E9);
		for (const char *c = word; *c; c++)
			outb(*c, PORT_OFF);
		return 0;
	}
	return usage();
}
