"""Leave files that run code when a careless reader unpickles them."""

import os
import pickle


class Trap:
    def __reduce__(self):
        return os.system, (f"touch {TRAP}",)  # noqa: F821  (the test defines it in front)


for name in ("result.pkl", "array.npy", "image.png", "model.pt", ".hidden"):
    with open(name, "wb") as file:
        file.write(pickle.dumps(Trap()))
print(pickle.dumps(Trap()))
