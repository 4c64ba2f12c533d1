import sys; sys.path.insert(0,'/work/main'); sys.path.insert(0,'/work/main/tests')
import pytest
def test_x(model, tokenizer, pictures):
    from chat import Chat
    for start in range(3):
        c=Chat(model,tokenizer)
        for files in ([0,1],[],[2],[],[3,0]):
            n=len(c.ids); t="".join(c.ask("?",[pictures[i] for i in files],40))
            print(len(c.ids)-n, repr(t))
        
