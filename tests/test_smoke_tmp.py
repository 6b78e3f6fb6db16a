import numpy as np, torch, tpjax
def test_a(tiny_model, quiet):
    folder, hf = tiny_model()
    ids=list(range(3,40))
    want=hf(torch.tensor([ids])).logits[0].detach().numpy()
    for t in (1,8):
        llm=tpjax.LLM(folder,t,max_model_len=128,**quiet)
        got=llm.logits(ids)
        print(np.abs(got-want).max(), np.abs(want).max())
        assert np.abs(got-want).max() < 1e-4*np.abs(want).max()
