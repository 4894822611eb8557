/* Holds the namespaces of a pod: does nothing until it is told to end, and waits for orphans as the first process must. */
#include <signal.h>
#include <unistd.h>

static void end(int signal)
{
	(void)signal;
	_exit(0);
}

int main(void)
{
	signal(SIGTERM, end);
	signal(SIGINT, end);
	/* The kernel then waits for children itself. */
	signal(SIGCHLD, SIG_IGN);
	for (;;)
		pause();
}
