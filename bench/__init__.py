"""``make bench``: the gateway beside a real sshd on the same host. ``bench/README.md`` reads it."""
