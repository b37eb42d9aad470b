"""What the candidates `late` and `later` run; a test changes it, and only `late` names it."""

DELAY_S = 0.004
