"""Models from site to site, without a coordinator: the mailbox, and who sends to whom."""
