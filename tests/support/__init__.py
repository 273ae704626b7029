"""What the tests share: fixtures and their truths, sysroots, the installed command, and a cage for what may hang."""
