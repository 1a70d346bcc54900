"""What fastssl costs beside other code: operations alone (ops), and whole training runs (twins)."""
