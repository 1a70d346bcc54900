"""What fastssl costs compared with other code: operations alone (ops), and whole training runs (twins)."""
